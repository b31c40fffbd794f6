"""The learning rate as a function of the optimizer step; rank changes never touch it."""

from __future__ import annotations

import math

from dynrank_ds.ranking.schedule import resolve_steps
from dynrank_ds.recipe_sections import TrainSection


def learning_rate(train: TrainSection, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 1): warm-up, then the schedule's decay to 0."""
    warmup = resolve_steps(train.warmup, total_steps, "train.warmup")
    if step <= warmup:
        return train.peak_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[train.schedule]
    return train.peak_rate * factor
