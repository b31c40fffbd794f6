"""Runs of one process group, begun or resumed, and what they held: FOLDER, then NAME or NAME-resumed of NAME.yaml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.training.loop import Trainer
from tests.support.watching import main, write

kept: list[Trainer] = []


class Kept(Trainer):
    """Can be looked at after its run."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        kept.append(self)


def runs(folder: Path) -> None:
    for name in sys.argv[2:]:
        recipe = load_recipe(str(folder / f"{name.partition('-')[0]}.yaml"), [f"output.dir={folder / name}"])
        with patch.object(run, "Trainer", Kept):
            run.train(recipe, True, torch.device("cpu"))
        write(folder, f"held-{name}", held(kept.pop()))


def held(trainer: Trainer) -> dict[str, int]:
    """Elements of the base, of this process's shard of it and of hpZ's copy, 0 where there is none."""
    base: list[Any] = [p for p in trainer.engine._model.parameters() if not p.requires_grad]
    return {
        "base": sum(getattr(p, "ds_numel", p.numel()) for p in base),
        "shard": sum(getattr(p, "ds_tensor", p).numel() for p in base),
        "copy": sum(
            p.ds_secondary_tensor.numel() for p in base if getattr(p, "ds_secondary_tensor", None) is not None
        ),
    }


if __name__ == "__main__":
    main([runs])
