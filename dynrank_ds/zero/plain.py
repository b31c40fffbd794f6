"""DeepSpeed as its documentation has it, around any model: what ZeroEngine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dynrank_ds.zero import processes


class PlainEngine:
    """A model whose forward returns its loss, in a bare DeepSpeed loop.

    Nothing of ZeroEngine is in it: no units that are fetched together, no optimizer or gradients of ours.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def train_step(
        self,
        micro_batches: Sequence[Mapping[str, Tensor]],
        before_update: Callable[[], object] = lambda: None,
    ) -> float:
        """Make one optimizer step, and return its loss: the mean over the processes of what each returns.

        Args:
            micro_batches: arguments of the model, of each micro-batch. Each loss must be a sum over this process's
                targets, divided by the targets of the global batch.
            before_update: is called after the last backward, while there are gradients.
        """
        loss = torch.zeros(())
        for number, micro_batch in enumerate(micro_batches, start=1):
            # The engine takes the mean over processes.
            part = self._engine(**micro_batch).loss * processes.world_size()
            self._engine.backward(part, scale_wrt_gas=False)
            loss += part.detach().cpu()
            if number == len(micro_batches):
                before_update()
            self._engine.step()
        return loss.item()
