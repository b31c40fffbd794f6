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

GatherFlat = Callable[[Tensor], Tensor]
NewRows = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]
"""(block, fp32 rows (rank, row_length) of all its triples by factor) -> fp32 rows of its new triples."""

GATHERED_AT_ONCE = 2**20
"""fp32 elements of blocks gathered together, 4 MiB: bounds what a process holds beyond its shards."""


def migrate(
    states: Tensor,
    old: ShardLayout,
    new: ShardLayout,
    plan: RankPlan,
    new_rows: NewRows,
    rules: tuple[Sequence[FragmentOf], Sequence[FragmentOf]],
    gather: GatherFlat,
) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
    """Carries `states` (n, old.numel) over to (n, new.numel); state 0 is the weights.

    New triples take `new_rows` as weights and 0 in every other state. `rules` holds every process's fragment
    rule of the old layout and of the new one. Also returns the whole new weights, fp32, of each changed block:
    {block: {factor: ...}}.
    """
    old_pieces = pieces(states, old)
    whole: dict[int, dict[str, Tensor]] = {}
    moved_pieces: dict[tuple[str, int], Tensor] = {}
    changed = set(plan.changed(old.ranks))
    moving = sorted(changed | _moved(old, rules))
    for blocks in portions(moving, old, states.shape[0]):
        full = gather_blocks(old_pieces, old, blocks, rules[0], gather)
        for block in blocks:
            rows = {f: full[f, block] for f in old.factors if old.ranks[block]}
            if block in changed:
                rows = _changed_rows(rows, block, old, plan, new_rows, states)
                whole[block] = {f: r[0].flatten() if f == "lora_E" else r[0] for f, r in rows.items()}
            moved_pieces |= {(f, block): r.flatten(1) for f, r in rows.items()}
    out = [
        moved_pieces[f.factor, f.block][:, f.start : f.stop]
        if (f.factor, f.block) in moved_pieces
        else old_pieces[f.factor, f.block]
        for f in new.fragments
    ]
    return torch.cat(out, dim=1), whole


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
    local: dict[tuple[str, int], Tensor],
    layout: ShardLayout,
    blocks: Sequence[int],
    fragments: Sequence[FragmentOf],
    gather: GatherFlat,
) -> dict[tuple[str, int], Tensor]:
    """{(factor, block): (n, rank, row_length)} of whole blocks of rank > 0; one collective.

    Empties `local` as it goes: it holds no more than two copies of the blocks at a time, beside the collective's own.
    """
    keys = [(factor, block) for factor in layout.factors for block in blocks if layout.ranks[block]]
    if not keys:
        return {}
    lengths = {(f, b): layout.shapes[b].row_length(f) for f, b in keys}
    spans = [[rule(f, b, layout.ranks[b] * lengths[f, b]) for f, b in keys] for rule in fragments]
    longest = max(sum(stop - start for start, stop in row) for row in spans)
    n = local[keys[0]].shape[0]
    mine = local[keys[0]].new_zeros(n, longest)
    filled = 0
    for key in keys:
        piece = local.pop(key)
        mine[:, filled : filled + piece.shape[1]] = piece
        filled += piece.shape[1]
    everyone = gather(mine.flatten()).view(len(fragments), n, longest)
    del mine
    full: dict[tuple[str, int], list[Tensor]] = {key: [] for key in keys}
    for process, row in enumerate(spans):
        sizes = [stop - start for start, stop in row]
        parts = everyone[process, :, : sum(sizes)].split(sizes, dim=1)
        for key, part in zip(keys, parts, strict=True):
            full[key].append(part)
    return {key: torch.cat(parts, dim=1).view(n, -1, lengths[key]) for key, parts in full.items()}
