"""The training loop: a step from its batch to its rank change, in one place.

indices of the global batch -> micro-batches of this process -> loss, backward
-> one reduction of scalars (loss, gradient norm, stop) -> method.observe -> optimizer step
-> every interval: scores -> plan -> resize -> next step
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from dynrank_ds.adapters.dropout import TokenDropout
from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.checkpoint.files import Progress
from dynrank_ds.data.batching import MixedBatches
from dynrank_ds.data.collating import Collator
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import RunError
from dynrank_ds.methods.base import Method, MicroBatch, StepView
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.batch_digest import BatchDigest
from dynrank_ds.training.held_out import held_out_loss
from dynrank_ds.training.rundir import RunDirectory
from dynrank_ds.training.samples import make_batches
from dynrank_ds.training.schedule import learning_rate
from dynrank_ds.training.signals import StopRequest
from dynrank_ds.training.trackers import Trackers
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine

logger = logging.getLogger(__name__)

MAX_DISCARDED_IN_A_ROW = 10


@dataclass
class StepResult:
    """What one global batch gave, the same on every process."""

    loss: float
    """Mean over the target tokens of the global batch, before the update."""
    gradient_norm: float
    """Before clipping."""
    stop: bool
    """Some process was asked to stop."""
    applied: bool
    """False where loss or gradient was not finite and the step was discarded everywhere."""
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    """By factor and vector, before clipping; {} where the step was discarded."""
    penalty: float | None = None
    """Value of the method's penalty, before the update; None where it has none."""
    tokens_per_second: float = 0.0
    """Tokens of the global batch, padding aside, by the step's whole time."""
    held_out_loss: float | None = None
    """After the update, at the steps that ask for it."""
    batch_digests: list[str] | None = None
    """Of each process's micro-batches, where the recipe asks for them."""


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run, and how they become tensors."""

    samples: TokenisedDataset
    held_out: TokenisedDataset
    collator: Collator


class Trainer:
    """Trains the adapter of `engine` by `recipe` from `progress` on.

    metadata: what every checkpoint says of the run. What asks `stop_request` to stop is for the caller to say.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        engine: ZeroEngine,
        method: Method,
        directory: RunDirectory,
        progress: Progress,
        metadata: Mapping[str, Any],
    ) -> None:
        self.recipe, self.data, self.engine, self.method = recipe, data, engine, method
        self.directory, self.progress, self.metadata = directory, progress, metadata
        self.device = engine.layout.device
        self.total_steps = recipe.total_steps(len(data.samples))
        self.batches = make_batches(data.samples, recipe)
        self.is_first = processes.rank() == 0
        self.stop_request = StopRequest()
        history = directory.adjustments() if self.is_first else []
        self.adjustments = len(history)
        self.masked_triples = sum(map(len, history[-1]["masked"].values())) if history else 0
        """Triples whose gate the last adjustment set to zero."""
        self.dropout: TokenDropout | None = None
        if recipe.adapter.dropout:
            self.dropout = TokenDropout(recipe.adapter.dropout, recipe.train.seed)
            for shape, module in zip(engine.shapes, engine.modules, strict=True):
                module.dropout = self.dropout.of_linear(module.part.linear if module.part else shape.name)
        self.batch_digest = BatchDigest() if recipe.output.log_batches else None
        self.trackers = Trackers()
        self.last_adjustment = ""
        """What the last adjustment since this process began changed, for the progress line."""
        self._discarded_in_a_row = 0
        self._warned_of_replaced_triples = False

    def train(self, after_step: Callable[[StepResult], Any]) -> bool:
        """Run to the last step; False where a signal ended it before.

        `after_step` sees every step, on every process.
        """
        while self.progress.step < self.total_steps:
            started = time.perf_counter()
            indices = self.batches.indices(self.progress.batch)
            result = self._step(indices)
            self.progress.batch += 1
            seconds = time.perf_counter() - started
            result.tokens_per_second = float(self.data.samples.lengths[indices].sum()) / seconds
            if result.applied and self._evaluates_at(self.progress.step):
                result.held_out_loss = held_out_loss(
                    self.engine,
                    self.data.held_out,
                    self.data.collator,
                    self.recipe.train.micro_batch_size,
                    self.device,
                )
            if self.batch_digest:
                result.batch_digests = self.batch_digest.of_each_process(self.device)
            self._log(result, seconds)
            after_step(result)
            if result.stop:
                return False
        return True

    def _evaluates_at(self, step: int) -> bool:
        interval = self.recipe.train.held_out_interval or self.total_steps
        return len(self.data.held_out) > 0 and (step % interval == 0 or step == self.total_steps)

    def _step(self, indices: NDArray[Any]) -> StepResult:
        step = self.progress.step + 1
        tokens = int(self.data.samples.lengths[indices].sum())
        loss = self._accumulate(indices, targets=int(self.data.samples.target_counts[indices].sum()))
        gradients = self.engine.gradients()
        result = self._reduce(loss, gradients)
        if not result.applied:
            self._discard(indices)
            return result
        self._discarded_in_a_row = 0
        rate = learning_rate(self.recipe.train, step, self.total_steps)
        rate_factor = rate / self.recipe.train.peak_rate
        layout = self.engine.layout
        view = StepView(
            step, self.engine.weights(), gradients, layout, tokens, rate_factor, processes.all_reduce_sum
        )
        if self.method.observes_after_step:
            self.engine.step(rate)
            scores = self._observe(
                replace(view, weights=self.engine.weights(), gradients=self._clipped(view, result))
            )
        else:
            scores = self._observe(view)
            self.engine.step(rate)
        self.progress.step = step
        if scores is not None:
            self._adjust(scores)
        return result

    def _observe(self, view: StepView) -> Sequence[Tensor] | None:
        self.method.observe(view)
        return self.method.scores(view) if self.method.adjusts_at(view.step) else None

    def _clipped(self, view: StepView, result: StepResult) -> Tensor:
        limit = self.recipe.train.max_grad_norm
        return view.gradients * min(1.0, limit / (result.gradient_norm + 1e-6)) if limit else view.gradients

    def _accumulate(self, indices: NDArray[Any], targets: int) -> Tensor:
        """Run forward and backward over this process's micro-batches; return its part of the mean loss, fp64."""
        micro_batches = self.data.collator.micro_batches(
            indices,
            self.data.samples.lengths,
            processes.rank(),
            processes.world_size(),
            self.recipe.train.micro_batch_size,
        )
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, chosen in enumerate(micro_batches, start=1):
            batch = self.data.collator.collate(self.data.samples, chosen)
            micro_batch = MicroBatch(
                token_mask=batch.attention_mask.to(self.device),
                packed=batch.packed,
                step=self.progress.step + 1,
                last=number == len(micro_batches),
            )
            self.method.begin_micro_batch(micro_batch)
            if self.dropout:
                self.dropout.begin_micro_batch(
                    micro_batch.step, chosen.tolist(), micro_batch.sample_sizes, self.device
                )
            inputs = batch.inputs()
            if self.batch_digest:
                self.batch_digest.add(inputs)
            summed = self.engine(**{name: value.to(self.device) for name, value in inputs.items()})
            # The engine takes the mean over processes: this makes it the mean over all target tokens.
            self.engine.backward(summed * (processes.world_size() / targets))
            loss += summed.detach().double() / targets
            if number < len(micro_batches):
                self.engine.end_micro_batch()
        return loss

    def _reduce(self, loss: Tensor, gradients: Tensor) -> StepResult:
        """Reduce the step's figures by one collective, the only wait for the device in a step."""
        layout, penalty = self.engine.layout, self.method.penalty
        squares = [
            torch.linalg.vector_norm(layout.factor(gradients, factor), dtype=torch.float64).square()
            for factor in layout.factors
        ]
        if layout.vectors:  # of one kind
            of_vectors = self.engine.vector_gradients()
            squares.append(torch.linalg.vector_norm(of_vectors, dtype=torch.float64).square())
        stop = loss.new_tensor(float(self.stop_request.received))
        # The penalty's value is the same on every process: the sum is divided by their number.
        share = loss.new_zeros(()) if penalty is None else penalty / processes.world_size()
        total_loss, stops, penalty_value, *squares_of_factors = processes.all_reduce_sum(
            torch.stack([loss, stop, share, *squares])
        ).tolist()
        square = sum(squares_of_factors)
        # DeepSpeed's ZeRO-3 looks for overflow in fp16 only: a NaN in bf16 would be applied.
        applied = math.isfinite(total_loss) and math.isfinite(square)
        if not applied:
            return StepResult(total_loss, math.nan, stops > 0, applied)
        return StepResult(
            total_loss,
            math.sqrt(square),
            stops > 0,
            applied,
            gradient_norms=dict(
                zip(layout.factors + layout.vectors, map(math.sqrt, squares_of_factors), strict=True)
            ),
            penalty=None if penalty is None else penalty_value,
        )

    def _discard(self, indices: NDArray[Any]) -> None:
        self.method.discard_step()
        self.engine.step(0.0, discard=True)
        self._discarded_in_a_row += 1
        if self.is_first:
            logger.warning(
                "step %d discarded: loss or gradient is not finite, on samples %s",
                self.progress.step + 1,
                indices.tolist(),
            )
        if self._discarded_in_a_row == MAX_DISCARDED_IN_A_ROW:
            raise RunError(
                f"{MAX_DISCARDED_IN_A_ROW} steps in a row were discarded, their loss or gradient is not finite: "
                "lower train.learning_rate, or look at the model and at the samples named above"
            )

    def _adjust(self, scores: Sequence[Tensor]) -> None:
        started = time.perf_counter()
        before = self.engine.layout.ranks
        limits = tuple(module.max_rank for module in self.engine.modules)
        state = RankState(before, limits, self.recipe.adapter.rank, self.progress.step, self.total_steps)
        plan = self.method.plan(scores, state)
        if not processes.agree(plan.sha256(), self.device):
            raise RuntimeError(f"processes disagree on the rank plan of step {self.progress.step}")
        if plan.changed(before):
            new_rows = partial(self._new_rows, plan)
            statistics = self.method.row_statistics
            statistics.update(self.engine.resize(plan, new_rows, statistics))
        if plan.masked:
            self.engine.mask(plan.masked)
        self.masked_triples = sum(map(len, plan.masked))
        self.method.applied(plan, self.progress.step)
        self.adjustments += 1
        if self.is_first:
            self._log_adjustment(plan, before, scores, time.perf_counter() - started)
            self._warn_of_replaced_triples(plan, before)

    def _warn_of_replaced_triples(self, plan: RankPlan, before: Sequence[int]) -> None:
        """Warn, once in a run, of an adjustment that prunes triples without changing any rank."""
        replaced = sum(plan.new)
        if replaced and plan.ranks == tuple(before) and not self._warned_of_replaced_triples:
            self._warned_of_replaced_triples = True
            logger.warning(
                "adjustment at step %d replaced %d of %d triples by new ones in the same modules and changed no rank: "
                "lower the number of triples per adjustment (method.k, method.b), or raise adapter.max_rank",
                self.progress.step,
                replaced,
                sum(before),
            )

    def _new_rows(self, plan: RankPlan, module: int, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self.engine.shapes[module].name
        generator = module_generator(self.recipe.train.seed, name, self.progress.step)
        return self.method.new_rows(module, old, plan, generator)

    def _log(self, result: StepResult, seconds: float) -> None:
        if not self.is_first:
            return
        layout = self.engine.layout
        evaluated: dict[str, Any] = (
            {} if result.held_out_loss is None else {"held_out_loss": result.held_out_loss}
        )
        if isinstance(self.batches, MixedBatches):
            counts = self.batches.counts(self.progress.batch - 1)
            evaluated |= {"samples_of": dict(zip(self.recipe.data.source, counts, strict=True))}
        if result.batch_digests is not None:
            evaluated |= {"batch_sha256": result.batch_digests}
        values: dict[str, Any] = dict(
            step=self.progress.step,
            batch=self.progress.batch,
            loss=result.loss if math.isfinite(result.loss) else None,
            learning_rate=learning_rate(self.recipe.train, max(1, self.progress.step), self.total_steps),
            grad_norm=result.gradient_norm if result.applied else None,
            grad_norms=dict(result.gradient_norms),
            penalty=result.penalty,
            discarded=not result.applied,
            tokens_per_second=result.tokens_per_second,
            total_rank_live=layout.total_rank - self.masked_triples,
            total_rank_stored=layout.total_rank,
            trainable_parameters=layout.trainable_parameters,
            memory_gib=processes.peak_memory_gib(),
            seconds=seconds,
            **evaluated,
        )
        self.directory.log_step(**values)
        self.trackers.log_step(values)

    def _log_adjustment(
        self, plan: RankPlan, before: Sequence[int], scores: Sequence[Tensor], seconds: float
    ) -> None:
        names = [shape.name for shape in self.engine.shapes]
        pruned = plan.pruned(before)
        values: dict[str, Any] = dict(
            adjustment=self.adjustments,
            step=self.progress.step,
            before=dict(zip(names, before, strict=True)),
            after=dict(zip(names, plan.ranks, strict=True)),
            pruned={n: p for n, p in zip(names, pruned, strict=True) if p},
            added={n: c for n, c in zip(names, plan.new, strict=True) if c},
            masked={n: list(m) for n, m in zip(names, plan.masked, strict=False) if m},
            scores={n: s.tolist() for n, s in zip(names, scores, strict=True)},
            plan_sha256=plan.sha256(),
            seconds=seconds,
        )
        self.directory.log_adjustment(**values)
        self.trackers.log_adjustment(values)
        self.last_adjustment = (
            f"step {self.progress.step}: {sum(map(len, pruned))} triples pruned, {sum(plan.new)} added, "
            f"{sum(map(len, plan.masked))} masked"
        )
