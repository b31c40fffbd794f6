"""What processes hold after rank changes, when their plans differ, and when a gradient is NaN on one of them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from safetensors.torch import save_file
from torch import Tensor

from dynrank_ds.adapters.linear import ModuleBackward
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import RunError
from dynrank_ds.methods.pe_dyra import PEDyRA
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.training import agreement, run
from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.training.samples import prepare_data
from dynrank_ds.zero import processes
from tests.support.watching import (
    adapter_parameters,
    differing,
    main,
    snapshot,
    train_watched,
    whole_of,
    without_padding,
    write,
)

NAN_METHODS = ("pe_dyra", "weightlora", "dynamic_dora")
"""With statistics of elements, of modules and of triples: each has its recipe in the folder."""
POISONED = {5: 0, 9: -1}
"""{global batch: row of the gradient that is NaN}: of the first process's shard, and of the last one's."""


class Sized(Trainer):
    """Notes after every adjustment what this process holds of each adapter parameter."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.held: list[dict[str, Any]] = []

    def _adjust(self, scores: Sequence[Tensor]) -> None:
        super()._adjust(scores)
        zero = self.engine._engine.optimizer
        states = zero.optimizer.state.values()
        parameters = adapter_parameters(self)
        self.held.append(
            {
                "factors": {f"{b}.{f}": pieces(p) for (b, f), p in parameters.items()},
                "all": {
                    "master": sum(flat.numel() for flat in zero.fp32_partitioned_groups_flat),
                    "exp_avg": sum(state["exp_avg"].numel() for state in states),
                    "exp_avg_sq": sum(state["exp_avg_sq"].numel() for state in states),
                },
            }
        )

    def train(self, after_step: Any) -> bool:
        finished = super().train(after_step)
        write(self.directory.path, "held", self.held)
        whole = {
            f"{module}.{factor}": whole_of(p, safe_get_local_fp32_param)
            for (module, factor), p in adapter_parameters(self).items()
        }
        if self.is_first:
            save_file(whole, self.directory.path / "trained.safetensors")
        return finished


def pieces(parameter: Any) -> dict[str, Any]:
    """Elements, padding and all, and whether the 16-bit copy is the rounded master."""
    master = safe_get_local_fp32_param(parameter)
    half = parameter.ds_tensor
    return {
        "numel": parameter.ds_numel,
        "master": master.numel(),
        "half": half.numel(),
        "exp_avg": safe_get_local_optimizer_state(parameter, "exp_avg").numel(),
        "exp_avg_sq": safe_get_local_optimizer_state(parameter, "exp_avg_sq").numel(),
        "half_is_master": torch.equal(
            without_padding(parameter, master).to(half.dtype), without_padding(parameter, half)
        ),
    }


class Disagreeing(Trainer):
    """The second process takes the worst triples for the best."""

    def _adjust(self, scores: Sequence[Tensor]) -> None:
        honest = self.method.plan

        def plan(values: Sequence[Tensor], state: RankState) -> RankPlan:
            return honest([-v for v in values] if processes.rank() == 1 else values, state)

        before = snapshot(self)
        with patch.object(self.method, "plan", plan):
            try:
                super()._adjust(scores)
            finally:
                write(self.directory.path, "changed", differing(before, snapshot(self)))


class Poisoned(Trainer):
    """On the second process alone, one element of one gradient becomes NaN in some global batches."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[dict[str, Any]] = []

    def _accumulate(self, indices: Any, targets: int) -> Tensor:
        row = POISONED.get(self.progress.batch)
        if row is None or processes.rank() != 1:
            return super()._accumulate(indices, targets)
        module = next(b for b in self.engine.modules if b.lora_A is not None)
        hook = module.on_backward
        assert hook is not None

        def poisoned(backward: ModuleBackward) -> None:
            hook(backward)
            for gradient in (backward.grad_a, backward.grad_b):
                gradient[row, -1 if row else 0] = torch.nan

        with patch.object(module, "on_backward", poisoned):
            return super()._accumulate(indices, targets)

    def _reduce(self, loss: Tensor, gradients: Tensor) -> StepResult:
        self.finite_here = bool(gradients.isfinite().all())
        return super()._reduce(loss, gradients)

    def _step(self, indices: Any) -> StepResult:
        before = snapshot(self)
        batch = self.progress.batch
        result = super()._step(indices)
        after = snapshot(self)
        self.seen.append(
            {
                "batch": batch,
                "step": self.progress.step,
                "applied": result.applied,
                "finite_here": self.finite_here,
                "changed": differing(before, after),
                "finite": all(bool(v.isfinite().all()) for v in after.values()),
            }
        )
        return result

    def train(self, after_step: Any) -> bool:
        finished = super().train(after_step)
        write(self.directory.path, "steps", self.seen)
        return finished


def sizes(folder: Path) -> None:
    for dtype in ("fp32", "bf16"):
        train_watched(folder / "recipe.yaml", Sized, f"output.dir={folder / dtype}", f"model.dtype={dtype}")


def disagreement(folder: Path) -> None:
    run = folder / "disagreement"
    try:
        train_watched(folder / "recipe.yaml", Disagreeing, f"output.dir={run}", "model.dtype=bf16")
    except RuntimeError as error:
        write(run, "failure", str(error))


def ranks_that_never_change(folder: Path) -> None:
    """Every plan keeps everything as it is."""

    def plan(self: PEDyRA, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        return RankPlan(tuple(tuple(range(rank)) for rank in state.ranks), (0,) * len(state.ranks))

    with patch.object(PEDyRA, "plan", plan):
        train_with_warnings(folder, "unchanged")


def triples_that_are_only_replaced(folder: Path) -> None:
    """Every module is at its largest rank, so that only those that were pruned have room."""
    train_with_warnings(folder, "replaced", "adapter.max_rank=4")


def train_with_warnings(folder: Path, name: str, *overrides: str) -> None:
    """A run in FOLDER/NAME, with its warnings."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dynrank_ds").addHandler(handler)
    train_watched(folder / "recipe.yaml", Trainer, f"output.dir={folder / name}", *overrides)
    logging.getLogger("dynrank_ds").removeHandler(handler)
    write(folder / name, "warnings", warnings)


def disks_that_are_not_shared(folder: Path) -> None:
    """Only the first process sees the run that is to go on."""
    seen = folder / ("unchanged" if processes.rank() == 0 else "elsewhere")
    try:
        run.train(load_recipe(str(folder / "recipe.yaml"), [f"output.dir={seen}"]), True, torch.device("cpu"))
    except RunError as error:
        write(folder, "unshared", str(error))


def data_that_differ(folder: Path) -> None:
    """The second process has fewer samples, as of an older copy on its node."""
    recipe = load_recipe(str(folder / "recipe.yaml"), [f"output.dir={folder / 'differing'}"])

    def fewer(whole: Recipe) -> tuple[TokenisedDataset, int]:
        limit = {"limit": 20 if processes.rank() else None}
        return prepare_data(whole.model_copy(update={"data": whole.data.model_copy(update=limit)}))

    try:
        with patch.object(run, "prepare_data", fewer):
            run.train(recipe, False, torch.device("cpu"))
    except RunError as error:
        write(folder, "differing", str(error))


def nodes_that_differ(folder: Path) -> None:
    """The second process is on another node, with an older package there, another recipe, and other code."""
    second = processes.rank() == 1
    recipe = load_recipe(
        str(folder / "recipe.yaml"), [f"output.dir={folder / 'unlike'}", f"train.seed={int(second)}"]
    )
    versions = {"torch": "2.12.0" if second else "2.13.0", "peft": None}
    try:
        with (
            patch.object(socket, "gethostname", lambda: f"node{processes.rank()}"),
            patch.object(agreement, "package_versions", lambda: versions),
            patch.object(agreement, "_code_hash", lambda: "b" * 64 if second else "a" * 64),
        ):
            run.train(recipe, False, torch.device("cpu"))
    except RunError as error:
        write(folder, "unlike", str(error))


def nan_on_one_process(folder: Path) -> None:
    for method in NAN_METHODS:
        recipe = folder / f"{method}.yaml"
        train_watched(recipe, Poisoned, f"output.dir={folder / f'nan-{method}'}", "model.dtype=bf16")


if __name__ == "__main__":
    main(
        [
            sizes,
            disagreement,
            ranks_that_never_change,
            triples_that_are_only_replaced,
            disks_that_are_not_shared,
            data_that_differ,
            nodes_that_differ,
            nan_on_one_process,
        ]
    )
