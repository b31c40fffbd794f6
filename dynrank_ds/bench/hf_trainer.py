"""Hugging Face's Trainer, made to repeat one global batch and to wait between its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynrank_ds.bench.sides import AfterStep
from dynrank_ds.recipe_sections import TrainSection


def train(
    make_model: Callable[[], nn.Module],
    section: TrainSection,
    micro_batches: Sequence[dict[str, Tensor]],
    config: dict[str, Any],
    folder: str,
    after_step: AfterStep,
) -> None:
    """Train until `after_step` returns False.

    Args:
        make_model: is called once the arguments stand, so that transformers partitions the model while loading.
        section: learning rate, AdamW's settings and clipping.
        micro_batches: of this process; the Trainer divides their loss by the global batch's targets itself.
        config: of DeepSpeed.
        folder: for what the Trainer writes.
        after_step: see Contender.
    """
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=section.micro_batch_size,
        gradient_accumulation_steps=len(micro_batches),
        max_steps=10**6,
        learning_rate=section.peak_rate,
        lr_scheduler_type="constant",
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_epsilon=section.eps,
        max_grad_norm=section.max_grad_norm,
        deepspeed=config,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model: Any = make_model()
    trainer = _OneBatch(model, arguments)
    trainer.micro_batches = micro_batches
    trainer.add_callback(_Waiting(trainer, after_step))
    trainer.train()


class _OneBatch(Trainer):
    """Its loader gives this process's micro-batches for ever, as its own would give those of a data set."""

    micro_batches: Sequence[dict[str, Tensor]]
    loss: Tensor
    """Of this process, summed over the step's micro-batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Endless(self.micro_batches), batch_size=None)

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        self.loss = getattr(self, "loss", torch.zeros(())) + loss.detach()
        return loss


class _Endless(IterableDataset[dict[str, Tensor]]):
    def __init__(self, micro_batches: Sequence[dict[str, Tensor]]) -> None:
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return cycle(self._micro_batches)


class _Waiting(TrainerCallback):
    """Ends a step where the Trainer ends it; all that it does until the next end belongs to the next step."""

    def __init__(self, trainer: _OneBatch, after_step: AfterStep) -> None:
        self._trainer, self._after_step = trainer, after_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        loss = self._trainer.loss.item()
        self._trainer.loss = torch.zeros(())
        control.should_training_stop = not self._after_step(loss)
