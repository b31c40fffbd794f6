"""Several real runs in one process group: FOLDER, then the overrides of each run, joined by commas."""

from __future__ import annotations

import sys
from pathlib import Path

from dynrank_ds.training.loop import Trainer
from tests.support.watching import main, train_watched


def runs(folder: Path) -> None:
    for overrides in sys.argv[2:]:
        train_watched(folder / "recipe.yaml", Trainer, *overrides.split(","))


if __name__ == "__main__":
    main([runs])
