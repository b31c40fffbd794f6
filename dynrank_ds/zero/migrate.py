"""Moving the rows of adapters from one rank allocation to the next, on shards.

Blocks that keep their rank keep their local fragments. Blocks that change are gathered, a few at a time,
cut and extended by rows, and each process keeps its new fragment. Weights, moments and the statistics
that belong to elements take the same way, stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynrank_ds.ranking.layout import FragmentOf, ShardLayout
from dynrank_ds.ranking.plan import RankPlan

GatherFlat = Callable[[Tensor], Tensor]
NewRows = Callable[[int, int], dict[str, Tensor]]
"""(block, count) -> fp32 rows of that many new triples, by factor."""

BLOCKS_AT_ONCE = 32
"""Changed blocks gathered together: bounds what a process holds beyond its shards."""


def zero3_fragment(rank: int, world_size: int) -> FragmentOf:
    """DeepSpeed's ZeRO-3 rule: equal pieces of ceil(numel / world_size) elements, the last ones short or empty."""

    def fragment(factor: str, block: int, numel: int) -> tuple[int, int]:
        piece = -(-numel // world_size)
        return min(rank * piece, numel), min((rank + 1) * piece, numel)

    return fragment


def migrate(
    states: Tensor,
    old: ShardLayout,
    new: ShardLayout,
    plan: RankPlan,
    new_rows: NewRows,
    fragments: Sequence[FragmentOf],
    gather: GatherFlat,
) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
    """Carries `states` (n, old.numel) over to (n, new.numel); state 0 is the weights.

    New triples take `new_rows` as weights and 0 in every other state. `fragments` holds the fragment rule
    of every process. Also returns the whole new weights, fp32, of each changed block: {block: {factor: ...}}.
    """
    old_pieces = pieces(states, old)
    whole: dict[int, dict[str, Tensor]] = {}
    changed_pieces: dict[tuple[str, int], Tensor] = {}
    changed = plan.changed(old.ranks)
    for start in range(0, len(changed), BLOCKS_AT_ONCE):
        blocks = changed[start : start + BLOCKS_AT_ONCE]
        full = gather_blocks(old_pieces, old, blocks, fragments, gather)
        for block in blocks:
            fresh = new_rows(block, plan.new[block])
            keep = torch.tensor(plan.keep[block], dtype=torch.int64, device=states.device)
            whole[block] = {}
            for factor in old.factors:
                length = old.shapes[block].row_length(factor)
                added = states.new_zeros(states.shape[0], plan.new[block], length)
                added[0] = fresh[factor].view(plan.new[block], length)
                kept = [full[factor, block][:, keep]] if len(keep) else []
                rows = torch.cat([*kept, added], dim=1)
                changed_pieces[factor, block] = rows.flatten(1)
                whole[block][factor] = rows[0].flatten() if factor == "lora_E" else rows[0]
    out = [
        changed_pieces[f.factor, f.block][:, f.start : f.stop]
        if (f.factor, f.block) in changed_pieces
        else old_pieces[f.factor, f.block]
        for f in new.fragments
    ]
    return torch.cat(out, dim=1), whole


def pieces(states: Tensor, layout: ShardLayout) -> dict[tuple[str, int], Tensor]:
    """{(factor, block): (n, local elements)}: `states` (n, numel) by fragment."""
    parts = states.split([f.stop - f.start for f in layout.fragments], dim=1)
    return {(f.factor, f.block): part for f, part in zip(layout.fragments, parts, strict=True)}


def gather_blocks(
    local: dict[tuple[str, int], Tensor],
    layout: ShardLayout,
    blocks: Sequence[int],
    fragments: Sequence[FragmentOf],
    gather: GatherFlat,
) -> dict[tuple[str, int], Tensor]:
    """{(factor, block): (n, rank, row_length)} of whole blocks of rank > 0; one collective."""
    keys = [(factor, block) for factor in layout.factors for block in blocks if layout.ranks[block]]
    if not keys:
        return {}
    lengths = {(f, b): layout.shapes[b].row_length(f) for f, b in keys}
    spans = [[rule(f, b, layout.ranks[b] * lengths[f, b]) for f, b in keys] for rule in fragments]
    longest = max(sum(stop - start for start, stop in row) for row in spans)
    held = torch.cat([local[key] for key in keys], dim=1)
    n = held.shape[0]
    mine = held.new_zeros(n, longest)
    mine[:, : held.shape[1]] = held
    everyone = gather(mine.flatten()).view(len(fragments), n, longest)
    full: dict[tuple[str, int], list[Tensor]] = {key: [] for key in keys}
    for process, row in enumerate(spans):
        sizes = [stop - start for start, stop in row]
        parts = everyone[process, :, : sum(sizes)].split(sizes, dim=1)
        for key, part in zip(keys, parts, strict=True):
            full[key].append(part)
    return {key: torch.cat(parts, dim=1).view(n, -1, lengths[key]) for key, parts in full.items()}
