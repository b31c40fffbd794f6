"""What happens in the steps that the benchmark times in FOLDER: whether the method saw them, and the rank after."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dynrank_ds.bench.step import Timing
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.run import set_up
from tests.support.watching import main, write


def slowed(call: Callable[..., None]) -> Callable[..., None]:
    def slow(*arguments: Any) -> None:
        time.sleep(0.01)
        call(*arguments)

    return slow


def watch(folder: Path) -> None:
    trainer = set_up(load_recipe(str(folder / "recipe.yaml")), False, torch.device("cpu"))
    timing = Timing(trainer)
    seen: list[Any] = []
    method = trainer.method
    for step in (
        (timing.quiet, True),
        (timing.quiet, False),
        (timing.adjusting[0], True),
        (timing.quiet, True),
    ):
        with patch.object(method, "observe", wraps=method.observe) as observe:
            [seconds] = timing.seconds([step])
        seen.append([*step, seconds > 0, observe.called, trainer.adjustments])
    write(folder, "seen", seen)
    kind = type(method)
    with (
        patch.object(kind, "on_backward", slowed(kind.on_backward)),
        patch.object(kind, "observe", slowed(kind.observe)),
    ):
        write(folder, "inside", Timing(trainer).seconds_inside())


if __name__ == "__main__":
    main([watch])
