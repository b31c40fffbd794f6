"""Inside a worker process: real training runs watched from within, and tensors put together plainly."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.training.loop import Trainer
from dynrank_ds.zero import processes

LocalPiece = Callable[[nn.Parameter], Tensor]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def train_watched(recipe: Path, watcher: type[Trainer], *overrides: str) -> None:
    """The real `train` with `watcher` in place of the Trainer."""
    with patch.object(run, "Trainer", watcher):
        run.train(load_recipe(str(recipe), overrides), False, torch.device("cpu"))


def adapter_parameters(trainer: Trainer) -> dict[tuple[str, str], nn.Parameter]:
    """{(module name, factor): partitioned parameter}."""
    return {
        (shape.name, factor): parameter
        for shape, module in zip(trainer.engine.shapes, trainer.engine.modules, strict=True)
        for factor, parameter in module.factors().items()
    }


def whole_of(parameter: nn.Parameter, piece: LocalPiece) -> Tensor:
    """The whole tensor from every process's piece: one after another, the padding at the end cut off."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, piece(parameter).detach().clone().flatten())
    return torch.cat(everyone)[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]


def without_padding(parameter: nn.Parameter, piece: Tensor) -> Tensor:
    """This process's piece; what DeepSpeed pads the last one with is memory that nobody ever wrote, even NaN."""
    length = -(-parameter.ds_numel // dist.get_world_size())  # type: ignore[attr-defined]
    return piece.flatten()[: max(0, parameter.ds_numel - dist.get_rank() * length)]  # type: ignore[attr-defined]


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of everything that training changes on this process."""
    engine, method = trainer.engine, trainer.method
    state: dict[str, Tensor] = {f"births {i}": births for i, births in enumerate(engine.births)}
    for (module, factor), parameter in adapter_parameters(trainer).items():
        pieces = {
            "master": safe_get_local_fp32_param(parameter),
            "half": parameter.ds_tensor,  # type: ignore[attr-defined]
            "exp_avg": safe_get_local_optimizer_state(parameter, "exp_avg"),
            "exp_avg_sq": safe_get_local_optimizer_state(parameter, "exp_avg_sq"),
        }
        for name, piece in pieces.items():
            state[f"{name} {module}.{factor}"] = without_padding(parameter, piece)
    statistics = {**method.row_statistics, **method.partial_statistics, **method.replicated_state}
    for name, value in statistics.items():
        state[f"statistic {name}"] = value
    optimizer = engine._engine.optimizer.optimizer
    steps = [optimizer.state[p]["step"] for group in optimizer.param_groups for p in group["params"]]
    state["optimizer steps"] = torch.tensor([engine.updates, *steps])
    state["ranks"] = torch.tensor(engine.layout.ranks)
    return {name: value.detach().clone() for name, value in state.items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """The names under which two snapshots are not bit for bit equal."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    )


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write(folder: Path, name: str, value: Any) -> None:
    """FOLDER/NAME-PROCESS.json, for the test to read."""
    (folder / f"{name}-{processes.rank()}.json").write_text(json.dumps(value))


def main(scenarios: Sequence[Callable[[Path], None]]) -> None:
    """Runs the scenarios, one after another, in one process group, on the folder of the command line."""
    processes.start()
    for scenario in scenarios:
        scenario(Path(sys.argv[1]))
    processes.stop()
