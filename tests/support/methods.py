"""Every method in a form that changes ranks within the 20 steps of tests/support/recipes.py (14 linears, rank 4)."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "pe_dyra": {"name": "pe_dyra", "t_i": 1, "interval": 3, "t_f": 2, "k": 5},
    "pe_dyra_auto": {"name": "pe_dyra", "t_i": 1, "interval": 4, "t_f": 2, "k": "auto", "k_max": 6},
    "pe_dyra_parameters": {
        "name": "pe_dyra",
        "t_i": 1,
        "interval": 4,
        "t_f": 2,
        "k": 5,
        "conserve": "parameters",
    },
    "adalora": {"name": "adalora", "t_i": 1, "interval": 4, "t_f": 6, "target_rank": 2},
    "elalora": {"name": "elalora", "t_i": 1, "interval": 4, "t_f": 3, "b": 5, "k": 2},
    "increlora": {"name": "increlora", "t_i": 2, "interval": 4, "target_rank": 5, "top_h": 3},
    "dynamic_dora": {"name": "dynamic_dora", "t_i": 3, "interval": 4, "t_f": 5, "target_rank": 3},
    "weightlora": {"name": "weightlora", "k": 5, "disconnect_at": 8},
    "weightlora_plus": {"name": "weightlora_plus", "k": 5, "disconnect_at": 8},
    "ard_lora": {"name": "ard_lora", "t_i": 2, "interval": 4, "t_f": 5, "alpha_lr": 0.05},
    "squeeze": {"name": "squeeze", "t_i": 2, "interval": 4, "t_f": 6, "target_rank": 2},
}
