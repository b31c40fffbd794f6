"""Moving the rows of adapters from one rank allocation to the next, on shards.

Modules that change are gathered, a few at a time, cut and extended by rows, and each process keeps its new
fragment. So are, under ZeRO-1 and 2, modules that keep their triples but lie elsewhere in the flat buffer; all
others stay where they are. Weights, moments and the statistics that belong to elements take the same way,
stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dynrank_ds.ranking.layout import Fragment, FragmentOf, ShardLayout
from dynrank_ds.ranking.plan import RankPlan

AllReduceSum = Callable[[Tensor], Tensor]
"""Sums over all processes, in place."""
NewRows = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]
"""(module, fp32 rows (rank, row_length) of all its triples by factor) -> fp32 rows of its new triples."""

GATHERED_AT_ONCE = 2**20
"""fp32 elements of modules gathered together, 4 MiB; two of these are held at a time, the last one and the next."""


def migrate(
    states: Tensor,
    old: ShardLayout,
    new: ShardLayout,
    plan: RankPlan,
    new_rows: NewRows,
    rules: tuple[Sequence[FragmentOf], Sequence[FragmentOf]],
    all_reduce_sum: AllReduceSum,
) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
    """Carry `states` (n, old.numel) over to (n, new.numel); state 0 is the weights.

    New triples take `new_rows` as weights and 0 in every other state. `rules` holds every process's fragment
    rule of the old layout and of the new one. Also returns the whole new weights, fp32, of each changed module:
    {module: {factor: ...}}.
    """
    held = pieces(states, old.fragments)
    whole: dict[int, dict[str, Tensor]] = {}
    own = {(f.factor, f.module): (f.start, f.stop) for f in new.fragments}
    changed = set(plan.changed(old.ranks))
    moving = sorted(changed | _moved(old, rules))
    for modules in portions(moving, module_sizes(old, old.fragments), states.shape[0]):
        full = gather_modules(held, old, modules, all_reduce_sum)
        for module in modules:
            rows = {f: full[f, module] for f in old.factors if old.ranks[module]}
            if module in changed:
                rows = _changed_rows(rows, module, old, plan, new_rows, states)
                whole[module] = {
                    f: (r[0].flatten() if f == "lora_E" else r[0]).clone() for f, r in rows.items()
                }
            for f, r in rows.items():
                start, stop = own.get((f, module), (0, 0))
                # Here and above copied: a view would keep the whole portion, all states of it.
                held[f, module] = r.flatten(1)[:, start:stop].clone()
    return torch.cat([held[f.factor, f.module] for f in new.fragments], dim=1), whole


def migrate_vectors(
    states: Tensor,
    old: ShardLayout,
    new: ShardLayout,
    rules: tuple[Sequence[FragmentOf], Sequence[FragmentOf]],
    all_reduce_sum: AllReduceSum,
) -> Tensor:
    """Carry `states` (n, local elements of all vectors) of one layout over to the next.

    Under ZeRO-1 and 2 vectors lie behind the triples in the flat buffer, and elsewhere when these are fewer or more.
    """
    held = pieces(states, old.vector_fragments)
    moving = sorted(
        {
            module
            for vector in old.vectors
            for module, shape in enumerate(old.shapes)
            for before, after in zip(*rules, strict=True)
            if before(vector, module, shape.vector_length(vector))
            != after(vector, module, shape.vector_length(vector))
        }
    )
    for modules in portions(moving, module_sizes(old, old.vector_fragments), states.shape[0]):
        full = gather_modules(held, old, modules, all_reduce_sum)
        for f in new.vector_fragments:
            if f.module in modules:
                held[f.factor, f.module] = full[f.factor, f.module][:, 0, f.start : f.stop].clone()
    return torch.cat([held[f.factor, f.module] for f in new.vector_fragments], dim=1)


def _moved(old: ShardLayout, rules: tuple[Sequence[FragmentOf], Sequence[FragmentOf]]) -> set[int]:
    """Return the modules of which some process holds other elements by the new rules than by the old."""
    return {
        module
        for module, (shape, rank) in enumerate(zip(old.shapes, old.ranks, strict=True))
        for factor in old.factors
        for before, after in zip(*rules, strict=True)
        if rank
        and before(factor, module, rank * shape.row_length(factor))
        != after(factor, module, rank * shape.row_length(factor))
    }


def _changed_rows(
    rows: Mapping[str, Tensor],
    module: int,
    old: ShardLayout,
    plan: RankPlan,
    new_rows: NewRows,
    states: Tensor,
) -> dict[str, Tensor]:
    """Return {factor: (n, new rank, row_length)} of a changed module from its old rows."""
    fresh = new_rows(module, {f: r[0] for f, r in rows.items()}) if plan.new[module] else {}
    keep = torch.tensor(plan.keep[module], dtype=torch.int64, device=states.device)
    out = {}
    for factor in old.factors:
        length = old.shapes[module].row_length(factor)
        added = states.new_zeros(states.shape[0], plan.new[module], length)
        if fresh:
            added[0] = fresh[factor].view(plan.new[module], length)
        kept = [rows[factor][:, keep]] if len(keep) else []
        out[factor] = torch.cat([*kept, added], dim=1)
    return out


def pieces(states: Tensor, fragments: Sequence[Fragment]) -> dict[tuple[str, int], Tensor]:
    """Return {(factor, module): (n, local elements)}: `states` (n, elements of all) by fragment."""
    parts = states.split([f.stop - f.start for f in fragments], dim=1)
    return {(f.factor, f.module): part for f, part in zip(fragments, parts, strict=True)}


def module_sizes(layout: ShardLayout, fragments: Sequence[Fragment]) -> list[int]:
    """Return the elements of every module, whole, in the factors of these fragments."""
    sizes = [0] * len(layout.shapes)
    for f in fragments:
        sizes[f.module] += layout.rows(f) * layout.row_length(f)
    return sizes


def portions(modules: Iterable[int], sizes: Sequence[int], n: int) -> Iterator[list[int]]:
    """Split `modules` into groups whose `n` states have at most GATHERED_AT_ONCE elements, or of one larger module.

    sizes: elements of a state of every module.
    """
    group: list[int] = []
    held = 0
    for module in modules:
        size = n * sizes[module]
        if group and held + size > GATHERED_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(module)
        held += size
    if group:
        yield group


def gather_modules(
    local: dict[tuple[str, int], Tensor],
    layout: ShardLayout,
    modules: Sequence[int],
    all_reduce_sum: AllReduceSum,
) -> dict[tuple[str, int], Tensor]:
    """Return {(factor, module): (n, rows, row_length)} fp32 of whole modules that have elements; one collective.

    local: this process's pieces, (n, elements) fp32, of the factors that are wanted. `all_reduce_sum` sums over
    processes in place: every element is held by one process, so that it needs no more memory than the modules
    themselves.
    """
    chosen = set(modules)
    fragments = [f for f in layout.all_fragments if f.module in chosen and (f.factor, f.module) in local]
    if not fragments:
        return {}
    lengths = [layout.row_length(f) for f in fragments]
    first = local[fragments[0].factor, fragments[0].module]
    sizes = [layout.rows(f) * length for f, length in zip(fragments, lengths, strict=True)]
    # On the device that trains: pieces may be offloaded.
    whole = first.new_zeros(len(first), sum(sizes), device=layout.device)
    views = whole.split(sizes, dim=1)
    for of, view in zip(fragments, views, strict=True):
        view[:, of.start : of.stop] = local[of.factor, of.module]
    all_reduce_sum(whole.view(torch.int32))  # as fp32, 0 + -0 would be 0
    return {
        (of.factor, of.module): view.view(len(view), -1, length)
        for of, view, length in zip(fragments, views, lengths, strict=True)
    }
