"""What the engine of a WeightLoRA run holds before and after adapters are dropped, counted element by element."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dynrank_ds.training.loop import Trainer
from dynrank_ds.zero.shards import MOMENTS
from tests.support.watching import main, train_watched, write


def counts(trainer: Trainer) -> dict[str, int]:
    """Elements of trainable parameters, of their fp32 copies, and of the optimizer's moments."""
    zero = trainer.engine._engine.optimizer
    return {
        "blocks": sum(bool(module.factors()) for module in trainer.engine.modules),
        "parameters": sum(p.ds_numel for p in trainer.engine._model.parameters() if p.requires_grad),  # type: ignore[attr-defined]
        "masters": sum(flat.numel() for flat in zero.fp32_partitioned_groups_flat),
        "moments": sum(state[name].numel() for state in zero.optimizer.state.values() for name in MOMENTS),
    }


def measured(folder: Path, name: str) -> None:
    class Measuring(Trainer):
        def _adjust(self, scores: Sequence[Tensor]) -> None:
            before = counts(self)
            super()._adjust(scores)
            write(folder, name, {"before": before, "after": counts(self), "ranks": self.engine.layout.ranks})

    overrides = [f"method.name={name}", "method.k=4", "method.disconnect_at=3", "train.steps=5"]
    train_watched(folder / "recipe.yaml", Measuring, *overrides, f"output.dir={folder / name}")


def both(folder: Path) -> None:
    for name in ("weightlora", "weightlora_plus"):
        measured(folder, name)


if __name__ == "__main__":
    main([both])
