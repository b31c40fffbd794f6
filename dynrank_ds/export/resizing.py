"""A LoRA adapter brought to another size: the best approximation of its updates, or more triples without effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrank_ds.adapters.initial import lora_factors, module_generator
from dynrank_ds.checkpoint.adapter import LinearShape
from dynrank_ds.errors import RunError
from dynrank_ds.export.folder import read_record, staged_folder
from dynrank_ds.export.low_rank import difference_norm, singular_values, svd
from dynrank_ds.export.peft_adapter import PeftAdapter, Update
from dynrank_ds.export.peft_writer import write_adapter

# Singular values below this share of a module's largest are rounding of the factorisation.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """What decides a module's rank."""

    singular: Tensor
    """(k,) fp64, descending, without those that are rounding."""
    cost: int
    """Parameters of a triple: in + out."""


@dataclass(frozen=True)
class Size:
    """A wanted size, of which exactly one field is given."""

    rank: int | None = None
    """Mean rank of a module."""
    parameters: int | None = None
    """At most so many elements of all factors."""
    keep: float | None = None
    """Share of the squared norm of all updates that must stay."""
    threshold: float | None = None
    """The smallest singular value of s B A that stays."""

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            RunError: naming the option.
        """
        for name, value in (("--rank", self.rank), ("--parameters", self.parameters)):
            if value is not None and value < 1:
                raise RunError(f"{name} is {value}: give at least 1")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RunError(f"--keep is {self.keep}: give a share above 0, at most 1")
        if self.threshold is not None and not self.threshold > 0:
            raise RunError(f"--threshold is {self.threshold}: give a singular value above 0")


@dataclass(frozen=True)
class ModuleChange:
    """What resizing did to a module."""

    name: str
    before: int
    after: int
    norm: float
    """Frobenius norm of its update."""
    error: float
    """Frobenius norm of what its update changed by, rounding of the stored factors included."""


def ranks_by_threshold(modules: Mapping[str, Spectrum], size: Size) -> dict[str, int]:
    """Return the rank of every module under one threshold of singular values for all.

    The largest singular values of all modules stay, which is the smallest total squared error at that number of
    triples; ties go to the earlier module. A module may end at rank 0.

    Raises:
        RunError: the size is more than there is.
    """
    found = [(float(s), name) for name, module in modules.items() for s in module.singular]
    order = sorted(range(len(found)), key=lambda i: -found[i][0])
    kept = order[
        : _triples_kept([(found[i][0], modules[found[i][1]].cost) for i in order], len(modules), size)
    ]
    ranks = dict.fromkeys(modules, 0)
    for i in kept:
        ranks[found[i][1]] += 1
    return ranks


def _triples_kept(ordered: list[tuple[float, int]], n_modules: int, size: Size) -> int:
    """How many of (singular value, cost), largest first, stay."""
    if size.rank is not None:
        wanted = size.rank * n_modules
        if wanted > len(ordered):
            raise RunError(
                f"--rank {size.rank} is {wanted} triples for {n_modules} modules, but the adapter has only "
                f"{len(ordered)} that change anything: add --uniform to grow it"
            )
        return wanted
    if size.threshold is not None:
        return sum(singular >= size.threshold for singular, _ in ordered)
    if (limit := size.parameters) is not None:
        return _longest(ordered, lambda spent: spent <= limit, lambda one: one[1])
    assert size.keep is not None
    least = size.keep * sum(singular**2 for singular, _ in ordered)
    below = _longest(ordered, lambda kept: kept < least * (1 - 1e-12), lambda one: one[0] ** 2)
    return min(len(ordered), below + 1)


def _longest(
    items: list[tuple[float, int]], allowed: Callable[[float], bool], of: Callable[[tuple[float, int]], float]
) -> int:
    """Return the length of the longest beginning whose sum is allowed."""
    total = 0.0
    for length, item in enumerate(items):
        total += of(item)
        if not allowed(total):
            return length
    return len(items)


def uniform_rank(modules: Mapping[str, Spectrum], size: Size) -> int:
    """Return the one rank for all modules.

    It is `rank`; the largest within `parameters`; the smallest that keeps the share `keep`; or the smallest at which no
    module loses a singular value of at least `threshold`.
    """
    spectra = [module.singular for module in modules.values()]
    if size.rank is not None:
        return size.rank
    if size.parameters is not None:
        return size.parameters // sum(module.cost for module in modules.values())
    if size.threshold is not None:
        return max(int((s >= size.threshold).sum()) for s in spectra)
    assert size.keep is not None
    total = sum(float(s.square().sum()) for s in spectra)
    longest = max(len(s) for s in spectra)
    kept = (sum(float(s[:rank].square().sum()) for s in spectra) for rank in range(1, longest + 1))
    return next(
        (rank for rank, value in enumerate(kept, 1) if value >= size.keep * total * (1 - 1e-12)), longest
    )


class ResizedAdapter:
    """A PEFT adapter at other ranks; factors are computed when they are asked for.

    A module that keeps its rank keeps its factors. One that shrinks gets the truncated SVD of s B A, half of each
    singular value in either factor. One that grows keeps its factors and gets triples of which B is zero and A drawn as
    at the start of a run: they change nothing, and B receives a gradient. Scales stay.
    """

    def __init__(self, source: PeftAdapter, ranks: Mapping[str, int], description: str) -> None:
        self.base_model, self.description = source.base_model, description
        self.linears = {
            name: LinearShape(
                rank, source.config.scale(name), source.modules[name][1], source.modules[name][0], 1
            )
            for name, rank in ranks.items()
        }
        self._source, self.weight_decomposed = source, source.weight_decomposed
        self.changes: dict[str, ModuleChange] = {}
        """Of the modules that were asked for."""

    def magnitudes(self, name: str) -> Tensor | None:
        """Those of the source, (out,) fp32: the rows of W + dW have them at any rank."""
        return self._source.magnitudes(name) if self.weight_decomposed else None

    def triples(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (r, out) of a module in the dtype of the source's factors."""
        rank, update = self.linears[name].rank, self._source.update(name)
        a, b = _resized(update, rank, name)
        a, b = a.to(self._source.dtype), b.to(self._source.dtype)
        error = difference_norm(update, Update(a.float(), b.float().T, update.scale))
        norm = float(singular_values(update).norm())
        self.changes[name] = ModuleChange(name, len(update.a), rank, norm, error)
        return a, b


def _resized(update: Update, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (rank, out) of the update at another rank."""
    old = len(update.a)
    if rank < old:
        u, singular, vt = svd(update)
        roots = (singular[:rank] / update.scale).sqrt()
        return vt[:rank] * roots[:, None], u.T[:rank] * roots[:, None]
    if rank == old:
        return update.a, update.b.T
    new = lora_factors(rank - old, update.a.shape[1], update.b.shape[0], module_generator(0, name, 0))
    return torch.cat([update.a, new["lora_A"]]), torch.cat([update.b.T, new["lora_B"]])


def resize_adapter(adapter: Path, output: Path, size: Size, uniform: bool) -> list[ModuleChange]:
    """Write `adapter` at another size as the PEFT folder `output`; return what was done to each module.

    Args:
        adapter: folder of a PEFT LoRA adapter.
        output: a folder that is new, empty, or an earlier output of the same.
        size: the size.
        uniform: the same rank everywhere instead of one threshold for all modules.

    Raises:
        RunError: for an adapter that is missing, damaged, not plain LoRA or has no effect, and a size that cannot be.
    """
    size.check()
    with PeftAdapter(adapter) as source:
        spectra = {name: _spectrum(source.update(name)) for name in source.modules}
        if not any(len(spectrum.singular) for spectrum in spectra.values()):
            raise RunError(f"{adapter} changes nothing: every lora_A or lora_B is zero")
        ranks = _uniform_ranks(source, spectra, size) if uniform else ranks_by_threshold(spectra, size)
        if not any(ranks.values()):
            raise RunError(f"{adapter}: at this size no triple is left; give a larger one")
        record = {
            "resized_from": str(adapter.resolve()),
            "size": {**{k: v for k, v in vars(size).items() if v is not None}, "uniform": uniform},
            **_provenance(adapter),
        }

        def same(there: Mapping[str, Any]) -> bool:
            return all(there.get(key) == record[key] for key in ("resized_from", "size"))

        resized = ResizedAdapter(source, ranks, str(adapter))
        with staged_folder(output, record, same, (adapter,)) as folder:
            write_adapter(resized, folder, "peft", source.dtype)
        dropped = {
            name: float(spectra[name].singular.norm()) for name in ranks if name not in resized.changes
        }
        return [
            resized.changes.get(name)
            or ModuleChange(name, source.ranks[name], 0, dropped[name], dropped[name])
            for name in ranks
        ]


def _spectrum(update: Update) -> Spectrum:
    singular = singular_values(update)
    return Spectrum(singular[singular > _ROUNDING * singular[0]], update.a.shape[1] + update.b.shape[0])


def _uniform_ranks(source: PeftAdapter, spectra: Mapping[str, Spectrum], size: Size) -> dict[str, int]:
    rank = uniform_rank(spectra, size)
    name, (out_features, in_features) = min(source.modules.items(), key=lambda item: min(item[1]))
    if rank > min(out_features, in_features):
        raise RunError(
            f"the rank would be {rank}, but {name} is {out_features} x {in_features}: at most "
            f"{min(out_features, in_features)} is possible with --uniform"
        )
    return dict.fromkeys(source.modules, rank)


def _provenance(adapter: Path) -> dict[str, Any]:
    """Return what dynrank.json of the source says of its training."""
    record = read_record(adapter)
    return {k: record[k] for k in ("method", "step", "base_model", "base_model_hash") if k in record}


def changes_text(changes: list[ModuleChange]) -> str:
    """Return a table of what was done to each module, and the totals."""
    width = max(len(change.name) for change in changes)
    lines = [f"{'module':{width}}  rank before  after  error of dW  relative"]
    for c in changes:
        share = c.error / c.norm if c.norm else 0.0
        lines.append(f"{c.name:{width}}  {c.before:11}  {c.after:5}  {c.error:11.4g}  {share:8.2%}")
    error, norm = (
        sum(v**2 for v in values) ** 0.5 for values in zip(*((c.error, c.norm) for c in changes), strict=True)
    )
    lines.append(
        f"total rank {sum(c.before for c in changes)} -> {sum(c.after for c in changes)}, error {error:.4g} "
        f"of {norm:.4g} ({error / norm:.2%})"
    )
    return "\n".join(lines)
