"""Moving the rows of adapters from one rank allocation to the next, on shards.

Blocks that change are gathered, a few at a time, cut and extended by rows, and each process keeps its new
fragment. So are, under ZeRO-1 and 2, blocks that keep their triples but lie elsewhere in the flat buffer; all
others stay where they are. Weights, moments and the statistics that belong to elements take the same way,
stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dynrank_ds.ranking.layout import FragmentOf, ShardLayout
from dynrank_ds.ranking.plan import RankPlan

Total = Callable[[Tensor], Tensor]
"""Sums over all processes, in place."""
NewRows = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]
"""(block, fp32 rows (rank, row_length) of all its triples by factor) -> fp32 rows of its new triples."""

GATHERED_AT_ONCE = 2**20
"""fp32 elements of blocks gathered together, 4 MiB; two of these are held at a time, the last one and the next."""


def migrate(
    states: Tensor,
    old: ShardLayout,
    new: ShardLayout,
    plan: RankPlan,
    new_rows: NewRows,
    rules: tuple[Sequence[FragmentOf], Sequence[FragmentOf]],
    total: Total,
) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
    """Carries `states` (n, old.numel) over to (n, new.numel); state 0 is the weights.

    New triples take `new_rows` as weights and 0 in every other state. `rules` holds every process's fragment
    rule of the old layout and of the new one. Also returns the whole new weights, fp32, of each changed block:
    {block: {factor: ...}}.
    """
    held = pieces(states, old)
    whole: dict[int, dict[str, Tensor]] = {}
    mine = {(f.factor, f.block): (f.start, f.stop) for f in new.fragments}
    changed = set(plan.changed(old.ranks))
    moving = sorted(changed | _moved(old, rules))
    for blocks in portions(moving, old, states.shape[0]):
        full = gather_blocks(held, old, blocks, total)
        for block in blocks:
            rows = {f: full[f, block] for f in old.factors if old.ranks[block]}
            if block in changed:
                rows = _changed_rows(rows, block, old, plan, new_rows, states)
                whole[block] = {
                    f: (r[0].flatten() if f == "lora_E" else r[0]).clone() for f, r in rows.items()
                }
            for f, r in rows.items():
                start, stop = mine.get((f, block), (0, 0))
                # Here and above copied: a view would keep the whole portion, all states of it.
                held[f, block] = r.flatten(1)[:, start:stop].clone()
    return torch.cat([held[f.factor, f.block] for f in new.fragments], dim=1), whole


def _moved(old: ShardLayout, rules: tuple[Sequence[FragmentOf], Sequence[FragmentOf]]) -> set[int]:
    """Blocks of which some process holds other elements by the new rules than by the old."""
    return {
        block
        for block, (shape, rank) in enumerate(zip(old.shapes, old.ranks, strict=True))
        for factor in old.factors
        for before, after in zip(*rules, strict=True)
        if rank
        and before(factor, block, rank * shape.row_length(factor))
        != after(factor, block, rank * shape.row_length(factor))
    }


def _changed_rows(
    rows: Mapping[str, Tensor],
    block: int,
    old: ShardLayout,
    plan: RankPlan,
    new_rows: NewRows,
    states: Tensor,
) -> dict[str, Tensor]:
    """{factor: (n, new rank, row_length)} of a changed block from its old rows."""
    fresh = new_rows(block, {f: r[0] for f, r in rows.items()}) if plan.new[block] else {}
    keep = torch.tensor(plan.keep[block], dtype=torch.int64, device=states.device)
    out = {}
    for factor in old.factors:
        length = old.shapes[block].row_length(factor)
        added = states.new_zeros(states.shape[0], plan.new[block], length)
        if fresh:
            added[0] = fresh[factor].view(plan.new[block], length)
        kept = [rows[factor][:, keep]] if len(keep) else []
        out[factor] = torch.cat([*kept, added], dim=1)
    return out


def pieces(states: Tensor, layout: ShardLayout) -> dict[tuple[str, int], Tensor]:
    """{(factor, block): (n, local elements)}: `states` (n, numel) by fragment."""
    parts = states.split([f.stop - f.start for f in layout.fragments], dim=1)
    return {(f.factor, f.block): part for f, part in zip(layout.fragments, parts, strict=True)}


def portions(blocks: Iterable[int], layout: ShardLayout, n: int) -> Iterator[list[int]]:
    """`blocks` in groups whose `n` states have at most GATHERED_AT_ONCE elements, or of one block that has more."""
    group: list[int] = []
    held = 0
    for block in blocks:
        size = n * layout.ranks[block] * layout.shapes[block].triple_parameters(layout.factors)
        if group and held + size > GATHERED_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(block)
        held += size
    if group:
        yield group


def gather_blocks(
    local: dict[tuple[str, int], Tensor], layout: ShardLayout, blocks: Sequence[int], total: Total
) -> dict[tuple[str, int], Tensor]:
    """{(factor, block): (n, rank, row_length)} fp32 of whole blocks of rank > 0; one collective.

    local: this process's pieces of them, (n, elements) fp32. `total` sums over processes in place: every element is
    held by one process, so that it needs no more memory than the blocks themselves wherever their pieces lie.
    """
    chosen = set(blocks)
    fragments = [f for f in layout.fragments if f.block in chosen]
    if not fragments:
        return {}
    lengths = [layout.shapes[f.block].row_length(f.factor) for f in fragments]
    first = local[fragments[0].factor, fragments[0].block]
    sizes = [layout.ranks[f.block] * length for f, length in zip(fragments, lengths, strict=True)]
    # On the device that trains: pieces may be offloaded.
    whole = first.new_zeros(len(first), sum(sizes), device=layout.device)
    views = whole.split(sizes, dim=1)
    for of, view in zip(fragments, views, strict=True):
        view[:, of.start : of.stop] = local[of.factor, of.block]
    total(whole.view(torch.int32))  # as fp32, 0 + -0 would be 0
    return {
        (of.factor, of.block): view.view(len(view), -1, length)
        for of, view, length in zip(fragments, views, lengths, strict=True)
    }
