"""A DeepSpeed ZeRO engine whose adapters can change rank.

A rank change rebuilds the engine around new adapter parameters: the base stays partitioned and is not
copied, the adapters' fp32 weights and moments are carried over by their rows. DeepSpeed offers no smaller
step, and a rebuild costs about one training step.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.adapters.pissa import PissaLinear
from dynrank_ds.ranking.layout import Fragment, FragmentOf, ModuleShape, ShardLayout
from dynrank_ds.ranking.plan import RankPlan
from dynrank_ds.zero import processes
from dynrank_ds.zero.deepspeed_internals import (
    nothing_broadcast,
    release_engine,
    release_parameter,
    trace_of_training_kept,
    without_needless_work,
)
from dynrank_ds.zero.migrate import (
    NewRows,
    gather_modules,
    migrate,
    migrate_vectors,
    module_sizes,
    portions,
)
from dynrank_ds.zero.partitioner import whole_copies
from dynrank_ds.zero.shards import MOMENTS, Shards, Zero2Shards, Zero3Shards

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer with RowAgedAdamW's `set_state` and `discard`."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where a module keeps its hooks."""


class ZeroEngine:
    """Training of the adapters in `modules` inside `model`, partitioned as the configuration's ZeRO stage has it.

    Under ZeRO-3 `unit` is the module class (a decoder layer) whose parameters are gathered and released together: with
    adapters a layer has dozens of small parameters, and fetching them module by module costs more than
    the layer's arithmetic on a small model. Its input must require a gradient, or DeepSpeed would reduce the
    unit's gradients before they exist.

    `rates` multiplies the learning rate of each factor. Flat vectors are fp32, of this process's elements, in
    the order of `layout`, on the device that trains, wherever the optimizer's state is. What modules train beside their
    triples (AdaptedModule.vectors) is partitioned and updated with them, and stays as it is when ranks change.
    """

    _has_frozen = False

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, AdaptedModule],
        factors: Sequence[str],
        config: dict[str, Any],
        make_optimizer: OptimizerFactory,
        rates: Mapping[str, float],
        unit: type[nn.Module],
    ) -> None:
        self.modules = list(modules.values())
        self.shapes = tuple(ModuleShape(n, b.in_features, b.out_features) for n, b in modules.items())
        self.factors = tuple(factors)
        self.vectors = tuple(self.modules[0].vectors())
        self.births = [torch.zeros(_rank(b), dtype=torch.int64) for b in self.modules]
        """Per module, the optimizer step after which each triple was born, (rank,)."""
        self.updates = 0
        """Optimizer steps applied so far."""
        self._model, self._config = model, config
        self._make_optimizer, self._rates = make_optimizer, dict.fromkeys(self.vectors, 1.0) | dict(rates)
        stage = config["zero_optimization"]["stage"]
        self._shards_of: type[Shards] = Zero3Shards if stage == 3 else Zero2Shards
        if stage == 3:
            set_z3_leaf_modules(model, [unit])
        # Every rebuild collects garbage, DeepSpeed's part of it too: it need not look through all that was imported
        # and loaded until now, which is most of a small model's rebuild.
        if ZeroEngine._has_frozen:  # the last engine: what its run left may be garbage by now
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        ZeroEngine._has_frozen = True
        atexit.register(gc.unfreeze)  # or libraries complain at exit of what they think was leaked
        self._build(self._layout([_rank(b) for b in self.modules]))

    # --- training

    def __call__(self, **batch: Tensor) -> Tensor:
        """Return the model's forward."""
        return self._engine(**batch)

    @torch.no_grad()
    def evaluate(self, **batch: Tensor) -> Tensor:
        """Return the model's forward outside training, between steps."""
        with trace_of_training_kept(self._engine):
            self._engine.eval()
            result = self._engine(**batch)
            self._engine.train()
        return result

    def backward(self, loss: Tensor) -> None:
        """Add the data-parallel mean of the loss's gradient; losses of several micro-batches add up unscaled."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, discard: bool = False) -> None:
        """Apply the gradients after the last micro-batch, or with `discard` drop them and change nothing."""
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.optimizer.optimizer.discard = discard
        self._engine.step()
        self.updates += not discard

    def end_micro_batch(self) -> None:
        """Tell DeepSpeed that a micro-batch of an optimizer step ended, and more follow."""
        self._engine.step()

    # --- shards

    def weights(self) -> Tensor:
        """Return the fp32 master weights of the triples."""
        return self._flat(self._shards.masters[: self._triples])

    def gradients(self) -> Tensor:
        """Return the triples' gradients of the whole step, between the last backward and `step`."""
        return self._shards.gradients()[: self.layout.numel]

    def vector_gradients(self) -> Tensor:
        """Return the gradients of what is trained beside the triples, as `gradients` does theirs."""
        return self._shards.gradients()[self.layout.numel :]

    def moments(self, name: str) -> Tensor:
        """Return the triples' moments `exp_avg` or `exp_avg_sq`."""
        return self._flat(self._shards.moments[name][: self._triples])

    @property
    def _triples(self) -> int:
        """Fragments of triples: those of vectors follow."""
        return len(self.layout.fragments)

    def _flat(self, views: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(views)).to(self.layout.device)

    def states(self) -> dict[str, list[Tensor]]:
        """Return views of the master weights and of both moments, one for each of all fragments of `layout`."""
        return {"master": self._shards.masters, **self._shards.moments}

    @torch.no_grad()
    def load(self, births: Sequence[Tensor], updates: int, read: Callable[[str, Fragment], Tensor]) -> None:
        """Set master weights, moments and ages, as from a checkpoint whose weights the modules already have.

        read: gives the elements of a fragment of one of `states`; it is asked for one at a time.
        """
        self.births, self.updates = list(births), updates
        self._shards.seed(self.births, self._rates, updates)
        for state, views in self.states().items():
            for fragment, view in zip(self.layout.all_fragments, views, strict=True):
                view.copy_(read(state, fragment))

    # --- ranks

    def resize(
        self, plan: RankPlan, new_rows: NewRows, statistics: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Change ranks to `plan`, in model, master, 16-bit copy and moments; returns `statistics` carried along.

        Every process must hold the same plan. New triples get `new_rows` as weights, zero moments and
        statistics, and the age 0.
        """
        names = [*MOMENTS, *statistics]
        states = torch.stack([self.weights(), *(self.moments(m) for m in MOMENTS), *statistics.values()])
        old, new = self.layout, self._layout(plan.ranks)
        rules = self._rules(old.ranks), self._rules(plan.ranks)
        moved, whole = migrate(states, old, new, plan, new_rows, rules, processes.all_reduce_sum)
        of_vectors = self._moved_vectors(old, new, rules)
        initial = self._initial_after(plan)
        self._close()
        for index, factors in whole.items():
            module = self.modules[index]
            for replaced in module.factors().values():
                release_parameter(replaced)
            module.set_factors(factors if plan.ranks[index] else {})
            kept = self.births[index][list(plan.keep[index])]
            self.births[index] = torch.cat([kept, kept.new_full((plan.new[index],), self.updates)])
        for set_initial in initial:
            set_initial()
        with nothing_broadcast():
            self._build(new)
        carried = dict(zip(names, moved[1:], strict=True))
        self._write(moved[0], carried, of_vectors)
        # The old engine is a web of references to itself, and lets go of its shards only when collected.
        gc.collect()
        return {name: carried[name].clone() for name in statistics}

    def _moved_vectors(
        self, old: ShardLayout, new: ShardLayout, rules: tuple[list[FragmentOf], list[FragmentOf]]
    ) -> dict[str, Tensor]:
        """Return the states of what is trained beside the triples, in the order of the new layout; {} without any."""
        if not self.vectors:
            return {}
        states = self.states()
        flat = torch.stack([self._flat(views[self._triples :]) for views in states.values()])
        moved = migrate_vectors(flat, old, new, rules, processes.all_reduce_sum)
        return dict(zip(states, moved, strict=True))

    def mask(self, masked: Sequence[Sequence[int]]) -> None:
        """Set lora_E of these triples of every module to 0; moments stay, and the next step may move them."""
        with torch.no_grad():
            self._shards.zero_gates(masked)
            for module, triples in zip(self.modules, masked, strict=True):
                if isinstance(module, PissaLinear):
                    module.mask_initial(triples)

    def whole_rows(self, state: Sequence[Tensor]) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (module, factor, (rows, row_length)) of a state, few modules a gather.

        state: one tensor for each fragment, of the triples alone or of all.
        """
        fragments = self.layout.all_fragments[: len(state)]
        local = {(f.factor, f.module): piece[None] for f, piece in zip(fragments, state, strict=True)}
        for some in portions(range(len(self.modules)), module_sizes(self.layout, fragments), 1):
            for (factor, module), rows in gather_modules(
                local, self.layout, some, processes.all_reduce_sum
            ).items():
                yield module, factor, rows[0]

    def hooks(self) -> int:
        """Return how many hooks all modules of the model have, which a rank change leaves as many."""
        return sum(len(getattr(module, kind)) for module in self._model.modules() for kind in _HOOKS)

    # --- building

    def _initial_after(self, plan: RankPlan) -> list[Callable[[], None]]:
        """Return what takes the initial triples of a plan's pruned triples out of their modules, once called."""
        changes: list[Callable[[], None]] = []
        for index in plan.changed(self.layout.ranks):
            module = self.modules[index]
            if isinstance(module, PissaLinear):
                initial_of, rows = module.rows_after(plan.keep[index], plan.new[index])
                if len(rows) == len(module.held):
                    module.initial_of = initial_of
                else:
                    changes.append(partial(_set_initial, module, _initial_rows(module, rows), initial_of))
        return changes

    def _rules(self, ranks: Sequence[int]) -> list[FragmentOf]:
        return self._shards_of.rules(self.shapes, ranks, self.factors, processes.world_size(), self.vectors)

    def _layout(self, ranks: Sequence[int]) -> ShardLayout:
        rule = self._rules(ranks)[processes.rank()]
        device = deepspeed.get_accelerator().current_device_name()
        return ShardLayout(self.shapes, ranks, self.factors, rule, device, self.vectors)

    def _build(self, layout: ShardLayout) -> None:
        self.layout = layout
        # DeepSpeed hangs its own attributes (ds_id, ds_tensor, ...) on parameters: no type knows them.
        params: list[Any] = [self._parameter(f) for f in layout.all_fragments]
        with without_needless_work():
            self._engine, *_ = deepspeed.initialize(
                model=self._model, optimizer=self._make_optimizer(params), config=self._config
            )
        self._shards = self._shards_of(self._engine.optimizer, params, layout)
        self._shards.seed(self.births, self._rates, self.updates)

    def _parameter(self, of: Fragment) -> nn.Parameter:
        module = self.modules[of.module]
        return (module.vectors() if of.factor in self.vectors else module.factors())[of.factor]

    @torch.no_grad()
    def _write(
        self, weights: Tensor, moments: Mapping[str, Tensor], of_vectors: Mapping[str, Tensor]
    ) -> None:
        sizes = [f.stop - f.start for f in self.layout.vector_fragments]
        for name, views in self.states().items():
            values = self.layout.split(weights if name == "master" else moments[name])
            values += of_vectors[name].split(sizes) if self.vectors else ()
            for view, value in zip(views, values, strict=True):
                view.copy_(value)

    def _close(self) -> None:
        release_engine(self._engine, self._model)
        del self._engine, self._shards


def _initial_rows(module: PissaLinear, rows: list[int]) -> dict[str, Tensor]:
    """Return these rows of a module's initial triples, whole on every process."""
    if not rows or module.initial_A is None or module.initial_B is None:
        return {}
    found = whole_copies({"lora_A": module.initial_A, "lora_B": module.initial_B})
    if module.initial_E is not None:
        found["lora_E"] = module.initial_E
    return {factor: value[rows] for factor, value in found.items()}


def _set_initial(
    module: PissaLinear, factors: Mapping[str, Tensor], initial_of: Sequence[int | None]
) -> None:
    for replaced in (module.initial_A, module.initial_B):
        if replaced is not None:
            release_parameter(replaced)
    module.set_initial(factors, initial_of)


def _rank(module: AdaptedModule) -> int:
    """Return the rank of a module, partitioned or not."""
    lora_a = module.lora_A
    if lora_a is None:
        return 0
    return getattr(lora_a, "ds_shape", lora_a.shape)[0]
