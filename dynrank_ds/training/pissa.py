"""The initial triples of a PiSSA run: computed once, each process some of the modules, and stored in the run directory.

A process reads one weight at a time from the model's files, whole and as the base has it before it is quantised; no
process holds more of the base than that. What it finds goes to all processes at once, module by module, so that none
waits for another longer than one decomposition takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.adapters.pissa import FrozenParameter, PissaLinear, frozen_parameter
from dynrank_ds.adapters.principal import principal_triples
from dynrank_ds.base_weights import BaseWeights, loaded_names
from dynrank_ds.checkpoint.initial import InitialWriter
from dynrank_ds.checkpoint.reading import Checkpoint
from dynrank_ds.errors import ModelError
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import fetch_model, model_without_weights
from dynrank_ds.zero import processes
from dynrank_ds.zero.partitioner import Partitioner, is_partitioned

logger = logging.getLogger(__name__)

Factors = dict[str, Tensor]


def start_from_principal_triples(
    modules: Mapping[str, AdaptedModule],
    recipe: Recipe,
    factors: Sequence[str],
    partitioner: Partitioner | None,
    device: torch.device,
) -> None:
    """Give every module the principal triples of its weight, trained and frozen, and write them into the run directory.

    factors: the method's. Every process must call it; the first one writes, under the name that `publish` changes.

    Raises:
        ModelError: a weight is not stored as one tensor, and the base is not whole.
    """
    started = time.perf_counter()
    linears = _pissa_linears(modules)
    ranked = {name: module for name, module in linears.items() if module.initial_rank}
    make = _maker(linears, partitioner)
    search = _Search(ranked, recipe, factors, device)
    writer = None
    if processes.rank() == 0:
        writer = InitialWriter(Path(recipe.output.dir), search.shapes, search.dtype)
    with search:
        for name, found in search.all_modules():
            ranked[name].set_factors(found)
            ranked[name].set_initial(found, range(ranked[name].initial_rank), make)
            if writer:
                writer.write(name, found)
    if writer:
        writer.close()
    share, error = search.summary()
    if processes.rank() == 0:
        logger.info(
            "PiSSA: the initial triples of %d modules hold %.1f %% of the squared norm of their weights; each is a "
            "singular value of its weight within %.1g of itself; found in %.1f s",
            len(ranked),
            100 * share,
            error,
            time.perf_counter() - started,
        )


def restore_initial_triples(
    modules: Mapping[str, AdaptedModule], checkpoint: Checkpoint, partitioner: Partitioner | None
) -> None:
    """Subtract the initial triples that a checkpoint says, as they are stored in its run directory.

    Raises:
        RunError: they are missing, or others.
    """
    linears = _pissa_linears(modules)
    make = _maker(linears, partitioner)
    device = next(iter(linears.values())).base.weight.device
    for name, initial_of, found in checkpoint.initial_triples():
        linears[name].set_initial({f: value.to(device) for f, value in found.items()}, initial_of, make)


def _pissa_linears(modules: Mapping[str, AdaptedModule]) -> dict[str, PissaLinear]:
    return {name: module for name, module in modules.items() if isinstance(module, PissaLinear)}


def _maker(linears: Mapping[str, PissaLinear], partitioner: Partitioner | None) -> FrozenParameter:
    """Return what makes parameters like the base's: partitioned from the start where its are."""
    base = next(iter(linears.values())).base.weight
    return partitioner.partitioned if partitioner and is_partitioned(base) else frozen_parameter


class _Search:
    """The decompositions of all modules, spread over the processes."""

    def __init__(
        self,
        linears: Mapping[str, PissaLinear],
        recipe: Recipe,
        factors: Sequence[str],
        device: torch.device,
    ) -> None:
        self._linears, self._seed, self._device = linears, recipe.train.seed, device
        self._with_gate = "lora_E" in factors
        self.dtype = next(iter(linears.values())).dtype
        self.shapes = {name: self._shapes(module) for name, module in linears.items()}
        self._weights = BaseWeights(fetch_model(recipe.model.path))
        names = loaded_names(model_without_weights(recipe.model.path), list(self._weights.entries))
        self._stored = {loaded.name: stored for stored, loaded in names.items() if not loaded.converted}
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)
        """Of the triples found, and of their weights, of this process's modules."""
        self._error = torch.zeros((), dtype=torch.float64, device=device)

    def all_modules(self) -> Iterator[tuple[str, Factors]]:
        """Yield every module with its factors, in the dtype of the base, on every process."""
        # The largest first: those that are decomposed at the same time are then of about one size.
        order = sorted(self._linears, key=self._weight_size, reverse=True)
        for first in range(0, len(order), processes.world_size()):
            some = order[first : first + processes.world_size()]
            mine = self._decompose(some[processes.rank()]) if processes.rank() < len(some) else None
            for owner, name in enumerate(some):
                sizes = [torch.Size(shape) for shape in self.shapes[name].values()]
                flat = torch.empty(sum(s.numel() for s in sizes), dtype=self.dtype, device=self._device)
                if owner == processes.rank() and mine is not None:
                    flat = torch.cat([mine[factor].flatten() for factor in self.shapes[name]])
                pieces = processes.broadcast(flat, owner).split([s.numel() for s in sizes])
                yield (
                    name,
                    {
                        factor: piece.view(size).clone()
                        for factor, piece, size in zip(self.shapes[name], pieces, sizes, strict=True)
                    },
                )

    def summary(self) -> tuple[float, float]:
        """Return the share of the weights' squared norm in the triples, and the largest relative error; collective."""
        triples, weights = processes.all_reduce_sum(self._squares).tolist()
        return triples / weights, float(processes.gather_flat(self._error.view(1)).max())

    def _weight_size(self, name: str) -> int:
        return self._linears[name].in_features * self._linears[name].out_features

    def _decompose(self, name: str) -> Factors:
        module = self._linears[name]
        weight = self._weight(name, module).to(self._device, torch.float32)
        found = principal_triples(weight, module.initial_rank, module_generator(self._seed, name, 0))
        norms = [
            found.sigma.double().square().sum(),
            torch.linalg.vector_norm(weight, dtype=torch.float64) ** 2,
        ]
        self._squares += torch.stack(norms)
        self._error.clamp_(min=found.error)
        factors = found.factors(module.scale, self._with_gate)
        return {factor: value.to(self.dtype) for factor, value in factors.items()}

    def _weight(self, name: str, module: PissaLinear) -> Tensor:
        """Return the weight (out, in), in the dtype of the base."""
        stored = self._stored.get(f"{name}.weight")
        shape = (module.out_features, module.in_features)
        if stored is not None and self._weights.entries[stored].shape == shape:
            read = torch.empty(shape, dtype=self.dtype)
            self._weights.read_into(stored, 0, read.view(-1))
            return read
        whole = module.base.weight.detach()
        if whole.shape != shape:  # partitioned, or packed
            raise ModelError(
                f"adapter.init is pissa, but the weight of {name} is not stored as it is used (transformers converts "
                "it on loading): leave it out of adapter.targets, or give adapter.init default"
            )
        return whole

    def _shapes(self, module: PissaLinear) -> dict[str, tuple[int, ...]]:
        rank = module.initial_rank
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, module.in_features)}
        if self._with_gate:
            shapes["lora_E"] = (rank,)
        return shapes | {"lora_B": (rank, module.out_features)}

    def __enter__(self) -> _Search:
        return self

    def __exit__(self, *error: object) -> None:
        self._weights.close()
