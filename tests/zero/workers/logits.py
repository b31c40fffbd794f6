"""A run whose logits are made a few rows at a time, and how often ZeRO-3 gathers the head for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from dynrank_ds.training import logits
from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.training.loss import SummedLoss
from tests.support.watching import main, train_watched, write

VOCABULARY = 100


class Counting(Trainer):
    """Notes for each step how often the head was gathered, and of how many chunks its logits were."""

    def train(self, after_step: Any) -> bool:
        model = self.engine._model
        assert isinstance(model, SummedLoss)
        head = model.model.get_output_embeddings().weight
        fetch, make = PartitionedParameterCoordinator.fetch_sub_module, model._head.layer.forward
        counts = {"gathers": 0, "chunks": 0}
        steps = []

        def counted_fetch(coordinator: Any, module: Any, forward: bool) -> None:
            absent = head.ds_status == ZeroParamStatus.NOT_AVAILABLE
            fetch(coordinator, module, forward)
            counts["gathers"] += absent and head.ds_status != ZeroParamStatus.NOT_AVAILABLE

        def counted_logits(*arguments: Any) -> Any:
            counts["chunks"] += 1
            return make(*arguments)

        def noted(result: StepResult) -> None:
            steps.append(dict(counts))
            counts.update(gathers=0, chunks=0)
            after_step(result)

        model._head.layer.forward = counted_logits
        with patch.object(PartitionedParameterCoordinator, "fetch_sub_module", counted_fetch):
            finished = super().train(noted)
        write(self.directory.path, "steps", steps)
        return finished


def runs(folder: Path) -> None:
    recipe, kept = folder / "recipe.yaml", f"deepspeed.config={folder / 'nothing_kept.json'}"
    train_watched(recipe, Counting, f"output.dir={folder / 'at_once'}", kept)
    with patch.object(logits, "LOGITS_AT_ONCE", 4 * VOCABULARY):
        train_watched(recipe, Counting, f"output.dir={folder / 'chunks'}", kept)
        train_watched(recipe, Counting, f"output.dir={folder / 'zero3'}")


if __name__ == "__main__":
    main([runs])
