"""Recipes drawn at random from what the schema accepts, for the tiny model of tests/support/recipes.py."""

from __future__ import annotations

import random
from typing import Any

_TARGETS: tuple[Any, ...] = (
    "all-linear",
    ["q_proj", "v_proj"],
    ["gate_proj", "down_proj", "o_proj"],
    r".*layers\.1\..*_proj",
)


def draw(seed: int) -> dict[str, Any]:
    """Sections that complete recipe.yaml: adapter, method, train, and some of data, model and deepspeed."""
    random_ = random.Random(seed)
    steps = random_.randint(4, 9)
    return {
        "base": "recipe.yaml",
        "model": {"dtype": random_.choice(["fp32", "fp32", "bf16"])},
        "data": {"packing": random_.random() < 0.3, "held_out": random_.choice([0, 0, 3])},
        "adapter": _adapter(random_),
        "method": _method(random_, steps),
        "train": _train(random_, steps),
        "deepspeed": {"config": random_.choice(["zero2", "zero3", "zero3", "zero3_offload"])},
    }


def _adapter(random_: random.Random) -> dict[str, Any]:
    rank = random_.randint(1, 6)
    section: dict[str, Any] = {"rank": rank, "alpha": random_.choice([4.0, 16.0, float(rank)])}
    section["targets"] = random_.choice(_TARGETS)
    if random_.random() < 0.4:
        section["max_rank"] = rank + random_.randint(0, 8)
    if random_.random() < 0.3:
        section["dropout"] = random_.choice([0.05, 0.3])
    if random_.random() < 0.2:
        section["layers"] = [random_.randint(0, 1)]
    return section


def _train(random_: random.Random, steps: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "global_batch_size": random_.choice([2, 4, 6]),
        "micro_batch_size": random_.choice([1, 1, 2]),
        "schedule": random_.choice(["linear", "cosine", "constant"]),
        "warmup": random_.choice([0, 1, 0.2]),
        "learning_rate": random_.choice([1e-3, 5e-3]),
        "activation_checkpointing": random_.random() < 0.3,
        "seed": random_.randint(0, 3),
    }


def _method(random_: random.Random, steps: int) -> dict[str, Any]:
    t_i, interval = random_.choice([0, 1, 0.2]), random_.choice([1, 2, 0.3])
    phase = {"t_i": t_i, "interval": interval}
    t_f = {"t_f": random_.choice([1, 2, 0.2])}
    target = {"target_rank": random_.randint(1, 4)}
    of_name: dict[str, dict[str, Any]] = {
        "lora": {},
        "pe_dyra": {**phase, **t_f, "k": random_.choice([1, 5, "auto"])},
        "adalora": {**phase, **t_f, **target},
        "elalora": {**phase, **t_f, "b": random_.randint(1, 6), "k": random_.randint(1, 3)},
        "increlora": {**phase, **target, "top_h": random_.randint(1, 4)},
        "dynamic_dora": {**phase, **t_f, **target},
        "weightlora": {"k": random_.randint(1, 6), "disconnect_at": random_.randint(1, steps)},
        "weightlora_plus": {"k": random_.randint(1, 6), "disconnect_at": random_.randint(1, steps)},
        "ard_lora": {**phase, **t_f},
        "squeeze": {**phase, **t_f, **target},
    }
    name = random_.choice(sorted(of_name))
    return {"name": name, **of_name[name]}
