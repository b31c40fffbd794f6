"""Runs of every recipe in FOLDER, and the dtypes of what they hold."""

from __future__ import annotations

from pathlib import Path

from dynrank_ds.training.loop import Trainer
from tests.support.watching import adapter_parameters, main, train_watched, write


def runs(folder: Path) -> None:
    found: dict[str, dict[str, list[str]]] = {}

    class Watcher(Trainer):
        def train(self, *arguments: object) -> bool:
            triples = {id(p): p for p in adapter_parameters(self).values()}
            base = {str(p.dtype) for p in self.engine._model.parameters() if id(p) not in triples}
            found[self.recipe.deepspeed.config] = {
                "triples": sorted({str(p.dtype) for p in triples.values()}),
                "base": sorted(base),
            }
            return super().train(*arguments)  # type: ignore[arg-type]

    for recipe in sorted(folder.glob("*-zero*.yaml")):
        train_watched(recipe, Watcher)
    write(folder, "dtypes", found)


if __name__ == "__main__":
    main([runs])
