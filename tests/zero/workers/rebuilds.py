"""A hundred adjustments in a row, and what each leaves behind."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dynrank_ds.training.loop import Trainer
from tests.support.watching import HOOKS, main, resident, train_watched, write

SINGLE = (
    "DeepSpeedEngine",
    "DeepSpeedZeroOptimizer_Stage3",
    "DeepSpeedZeRoOffload",
    "PartitionedParameterCoordinator",
    "RowAgedAdamW",
)


class Counted(Trainer):
    """Counts hooks, engines, tensors and memory after adjustments."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counts: list[dict[str, Any]] = []

    def _adjust(self, scores: Sequence[Tensor]) -> None:
        before, old = self.engine.layout.ranks, weakref.ref(self.engine._engine)
        parameters = [weakref.ref(p) for module in self.engine.modules for p in module.factors().values()]
        super()._adjust(scores)
        trained = {id(p) for module in self.engine.modules for p in module.factors().values()}
        modules = dict(self.engine._model.named_modules())
        self.counts.append(
            {
                "ranks": [before, self.engine.layout.ranks],
                "old_engine_is_gone": old() is None,
                "old_parameters_are_gone": all(p() is None or id(p()) in trained for p in parameters),
                "resident": resident(),
                # As text, so that these notes are no objects that the collector counts.
                "hooks": json.dumps(
                    {n: [len(getattr(m, kind)) for kind in HOOKS] for n, m in modules.items()}
                ),
            }
        )
        if len(self.counts) in (20, 100):
            gc.collect()
            alive = [type(thing).__name__ for thing in gc.get_objects()]
            self.counts[-1]["alive"] = {name: alive.count(name) for name in SINGLE}
            self.counts[-1]["tensors"] = alive.count("Tensor") + alive.count("Parameter")
            self.counts[-1]["objects"] = len(alive)

    def train(self, after_step: Any) -> bool:
        finished = super().train(after_step)
        write(self.directory.path, "counts", self.counts)
        return finished


def hundred_adjustments(folder: Path) -> None:
    train_watched(
        folder / "recipe.yaml",
        Counted,
        f"output.dir={folder / 'rebuilds'}",
        "train.steps=206",
        "method.interval=2",  # an engine's first step is recorded, in its second there is more that could stay
        "method.k=2",
        "adapter.targets=[q_proj, down_proj]",
        "train.micro_batch_size=3",
    )


if __name__ == "__main__":
    main([hundred_adjustments])
