"""Runs with model.dtype auto on simulated machines: FOLDER."""

from __future__ import annotations

import logging
from pathlib import Path
from unittest.mock import patch

import torch

from dynrank_ds import dtypes
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.zero import processes
from tests.support.watching import main, write

WITH, WITHOUT = "flags\t: avx2 avx512_bf16\n", "flags\t: avx2 fma\n"
# Run, the CPUs of both processes, whether the run is resumed
RUNS = [
    ("native", (WITH, WITH), False),
    ("mixed", (WITH, WITHOUT), False),
    ("emulated", (WITHOUT, WITHOUT), False),
    ("native", (WITHOUT, WITHOUT), True),
    ("emulated", (WITH, WITH), True),
]


class Lines(logging.Handler):
    """What was said about the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("model.dtype"):
            self.messages.append(record.getMessage())


def runs(folder: Path) -> None:
    lines = Lines()
    logging.getLogger("dynrank_ds").addHandler(lines)
    logging.getLogger("dynrank_ds").setLevel(logging.INFO)
    for number, (name, machines, resume) in enumerate(RUNS):
        cpuinfo = folder / f"cpuinfo-{processes.rank()}"
        cpuinfo.write_text(machines[processes.rank()])
        recipe = load_recipe(str(folder / "recipe.yaml"), [f"output.dir={folder / name}", "train.steps=2"])
        with patch.object(dtypes, "_CPUINFO", cpuinfo):
            run.train(recipe, resume, torch.device("cpu"))
        write(folder, f"messages-{number}", lines.messages)
        lines.messages = []


if __name__ == "__main__":
    main([runs])
