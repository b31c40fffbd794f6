"""The DeepSpeed configuration of a run: a file of the user's, completed by what the recipe fixes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from dynrank_ds.documents import DuplicateKeyError, parse_json
from dynrank_ds.errors import RecipeError
from dynrank_ds.zero.config_checks import check_config

_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train",
    "scheduler": "train",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}


def load_config(name: str, bf16: bool) -> dict[str, Any]:
    """Return a DeepSpeed configuration by the name of a shipped file (`zero3`) or by path.

    Raises:
        RecipeError: no such file, not JSON, a key that the recipe owns, or no ZeRO stage from 1 to 3;
            stage 1 in bf16, for which DeepSpeed has another optimizer, without shards of its own to resize; or what
            `check_config` refuses.
    """
    shipped = resources.files("dynrank_ds.ds_configs").joinpath(f"{name}.json")
    path = Path(name)
    if not (shipped.is_file() or path.is_file()):
        known = sorted(
            f.name[:-5] for f in resources.files("dynrank_ds.ds_configs").iterdir() if f.name.endswith("json")
        )
        raise RecipeError(f"deepspeed.config is '{name}': neither a file nor one of {', '.join(known)}")
    try:
        config = parse_json(shipped.read_text() if shipped.is_file() else path.read_text())
    except DuplicateKeyError as error:
        raise RecipeError(f"deepspeed.config {name}: {error}: remove one of the two") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"deepspeed.config {name} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"deepspeed.config {name} holds {type(config).__name__}, not a JSON object")
    for key, owner in _OWNED.items():
        if key in config:
            raise RecipeError(
                f"deepspeed.config {name} sets '{key}': remove it, the recipe's {owner} decides it"
            )
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise RecipeError(f"deepspeed.config {name} has zero_optimization.stage {stage}: give 1, 2 or 3")
    if stage == 1 and bf16:
        raise RecipeError(
            f"deepspeed.config {name} has zero_optimization.stage 1 with model.dtype bf16: give stage 2, or fp32"
        )
    if not shipped.is_file():  # a test checks those; DeepSpeed's schema takes seconds to import
        check_config(config, f"deepspeed.config {name}")
    return config


def check_processes(config: Mapping[str, Any], name: str, world_size: int) -> None:
    """Refuse a configuration that does not fit the number of processes.

    Raises:
        RecipeError: the group that hpZ gathers within is no divisor of it.
    """
    group = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if not isinstance(group, int) or group < 1 or world_size % group:
        raise RecipeError(
            f"deepspeed.config {name} has zero_hpz_partition_size {group}, which does not divide {world_size} "
            "processes: give the number of processes on a node"
        )


def complete_config(
    config: dict[str, Any], micro_batch_size: int, accumulation: int, max_grad_norm: float, bf16: bool
) -> dict[str, Any]:
    """Return the configuration handed to DeepSpeed. Gradients accumulate and travel in fp32."""
    return {
        **config,
        # The order in which stages 1 and 2 concatenate parameters is known only without these.
        "zero_optimization": config["zero_optimization"]
        | {"round_robin_gradients": False, "parameter_alignment": False},
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # RowAgedAdamW is ours, and runs wherever the optimizer's shards are.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
