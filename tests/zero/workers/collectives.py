"""Every collective of a step: ours by name and size, and all that reach the process group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.zero import processes
from tests.support.watching import main, train_watched, write

OURS = ("all_reduce", "all_gather_into_tensor", "broadcast", "barrier")
OF_A_GROUP = [
    name
    for name in dir(dist.ProcessGroup)
    if any(word in name for word in ("reduce", "gather", "scatter", "broadcast", "alltoall", "barrier"))
]
reached: list[str] = []
"""Collectives that reached the process group, whoever issued them, and tensors formatted as text."""


class CountingDist:
    """torch.distributed, for dynrank_ds.zero.processes, that notes what is sent."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(dist, name)
        if name in ("get_rank", "get_world_size", "is_initialized"):
            return function
        assert name in OURS, f"a new collective to count: {name}"

        def counted(*arguments: Any) -> Any:
            sent = [argument for argument in arguments if isinstance(argument, Tensor)]
            self.calls.append([name, sent[-1].nbytes if sent else 0])
            return function(*arguments)

        return counted


def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The process group's method, noted at every call."""

    def noted(*arguments: Any, **options: Any) -> Any:
        reached.append(name)
        return method(*arguments, **options)

    return noted


class Counted(Trainer):
    """Notes for each step our collectives since the last backward, and all collectives."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[dict[str, Any]] = []

    def _reduce(self, loss: Tensor, gradients: Tensor) -> StepResult:
        assert isinstance(processes.dist, CountingDist)
        self.before_reduction = list(processes.dist.calls)
        return super()._reduce(loss, gradients)

    def _adjust(self, *arguments: Any) -> Any:
        before = list(reached)
        adjusted = super()._adjust(*arguments)
        self.adjustment = {name: reached.count(name) - before.count(name) for name in sorted(set(reached))}
        return adjusted

    def _step(self, indices: Any) -> StepResult:
        counting = processes.dist
        assert isinstance(counting, CountingDist)
        counting.calls.clear()
        ranks = self.engine.layout.ranks
        reached.clear()
        self.adjustment: dict[str, int] = {}
        result = super()._step(indices)
        step = self.progress.step
        plan_changed = [b for b, a in zip(ranks, self.engine.layout.ranks, strict=True) if b != a]
        self.steps.append(
            {
                "step": step,
                "adjusts": self.method.adjusts_at(step),
                "rank_changes": len(plan_changed),
                "before_reduction": self.before_reduction,
                "ours": list(counting.calls),
                "adjustment": self.adjustment,
                "all": {name: reached.count(name) for name in sorted(set(reached))},
            }
        )
        return result

    def train(self, after_step: Any) -> bool:
        finished = super().train(after_step)
        write(self.directory.path, "collectives", self.steps)
        return finished


def collectives(folder: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(patch.object(processes, "dist", CountingDist()))
        for name in OF_A_GROUP:
            method = getattr(dist.ProcessGroup, name)
            stack.enter_context(patch.object(dist.ProcessGroup, name, noting(name, method)))
        formatted = noting("formatted", Tensor.__repr__)
        stack.enter_context(patch.object(Tensor, "__repr__", formatted))
        few = ["train.steps=4", "method.k=35", "method.t_i=0", "method.interval=2", "method.t_f=1"]
        for recipe, overrides in (
            ("pe_dyra", ["train.steps=12", "method.interval=5", "method.t_i=2"]),
            (
                "held_out",
                [
                    "train.steps=12",
                    "method.interval=5",
                    "method.t_i=2",
                    "data.held_out=4",
                    "train.held_out_interval=7",
                ],
            ),
            ("lora", ["train.steps=12"]),
            # 7 linears in each of 5 layers, each pruned or grown: more than are gathered at once.
            ("deep", few),
            ("deep_zero2", [*few, "deepspeed.config=zero2"]),
        ):
            run = folder / recipe / "run"
            train_watched(folder / recipe / "recipe.yaml", Counted, f"output.dir={run}", *overrides)


if __name__ == "__main__":
    main([collectives])
