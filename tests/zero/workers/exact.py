"""Runs whose weights and moments are recorded at each step, or compared with a record at the first: FOLDER MODE RUNS...

MODE record: each run writes its whole tensors to RECORD-of-RUN before every update. MODE NAME of a recorded run: each
run, which is resumed, compares with that record before its first update, and writes which tensors differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.training.loop import Trainer
from tests.support.watching import adapter_parameters, differing, main, write

FOLDER, MODE, *RUNS = sys.argv[1:]
OVERRIDES = "train.global_batch_size=14,train.checkpoint_interval=1,train.checkpoints_kept=20"


def whole_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """fp32 weights, their copies in the model's dtype, moments and ages, put together from all processes' pieces."""
    pieces: dict[str, Tensor] = {}
    sizes: dict[str, Any] = {}
    for (module, factor), parameter in adapter_parameters(trainer).items():
        for name, piece in {
            "master": safe_get_local_fp32_param(parameter),
            "copy": parameter.ds_tensor,  # type: ignore[attr-defined]
            "exp_avg": safe_get_local_optimizer_state(parameter, "exp_avg"),
            "exp_avg_sq": safe_get_local_optimizer_state(parameter, "exp_avg_sq"),
        }.items():
            key = f"{name} {module}.{factor}"
            pieces[key] = piece.detach().clone().flatten()
            sizes[key] = (parameter.ds_numel, parameter.ds_shape)  # type: ignore[attr-defined]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces)
    found = {
        key: torch.cat([of[key] for of in everyone])[:numel].view(shape).clone()
        for key, (numel, shape) in sizes.items()
    }
    births = {f"births {i}": births.clone() for i, births in enumerate(trainer.engine.births)}
    return found | births | {"updates": torch.tensor([trainer.engine.updates])}


def record(name: str, step: int) -> Path:
    return Path(FOLDER) / f"record-of-{name}" / f"{step}.safetensors"


class Recording(Trainer):
    def _step(self, indices: Any) -> Any:
        if self.progress.step:
            tensors = whole_tensors(self)
            if self.is_first:
                path = record(self.directory.path.name, self.progress.step)
                path.parent.mkdir(exist_ok=True)
                save_file(tensors, path)
        return super()._step(indices)


class Comparing(Trainer):
    compared = False

    def _step(self, indices: Any) -> Any:
        if not self.compared:
            self.compared = True
            recorded, found = load_file(record(MODE, self.progress.step)), whole_tensors(self)
            write(Path(FOLDER), f"differing-{self.directory.path.name}", differing(recorded, found))
        return super()._step(indices)


def runs(folder: Path) -> None:
    with patch.object(run, "Trainer", Recording if MODE == "record" else Comparing):
        for name in RUNS:
            recipe = load_recipe(
                str(folder / "recipe.yaml"), [*OVERRIDES.split(","), f"output.dir={folder / name}"]
            )
            run.train(recipe, True, torch.device("cpu"))


if __name__ == "__main__":
    main([runs])
