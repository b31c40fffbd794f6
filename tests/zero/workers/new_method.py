"""A method of a test file, trained whole in FOLDER/whole, and stopped and resumed in FOLDER/resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynrank_ds.methods import METHODS
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.training.loop import StepResult, Trainer
from tests.methods.test_new_method import GREEDY
from tests.support.documented_method import Greedy
from tests.support.watching import main, train_watched


class Stopped(Trainer):
    """Asked to stop in step 10."""

    def _step(self, indices: Any) -> StepResult:
        if self.progress.step == 9:
            self.stop_request.ask()
        return super()._step(indices)


def train(folder: Path) -> None:
    METHODS["greedy"] = Greedy
    overrides = [f"method.{key}={value}" for key, value in GREEDY.items()]
    recipe = folder / "recipe.yaml"
    train_watched(recipe, Trainer, f"output.dir={folder / 'whole'}", *overrides)
    overrides.append(f"output.dir={folder / 'resumed'}")
    train_watched(recipe, Stopped, *overrides)
    run.train(load_recipe(str(recipe), overrides), True, torch.device("cpu"))


if __name__ == "__main__":
    main([train])
