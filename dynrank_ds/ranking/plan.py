"""What is decided about ranks: plain data, the same on every process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RankState:
    """What a policy may know besides the scores."""

    ranks: tuple[int, ...]
    max_ranks: tuple[int, ...]
    step: int
    total_steps: int


@dataclass(frozen=True)
class RankPlan:
    """Per block: which triples stay, in ascending order, and how many new ones are appended behind them."""

    keep: tuple[tuple[int, ...], ...]
    new: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks after the plan."""
        return tuple(len(kept) + added for kept, added in zip(self.keep, self.new, strict=True))

    def changed(self, ranks: Sequence[int]) -> list[int]:
        """Blocks that the plan touches, given the ranks before it."""
        return [b for b, rank in enumerate(ranks) if self.new[b] or len(self.keep[b]) != rank]

    def pruned(self, ranks: Sequence[int]) -> list[list[int]]:
        """Per block, the indices of the triples that go."""
        return [sorted(set(range(rank)) - set(kept)) for rank, kept in zip(ranks, self.keep, strict=True)]

    def sha256(self) -> str:
        """Equal on all processes exactly if their plans are."""
        return hashlib.sha256(repr((self.keep, self.new)).encode()).hexdigest()


def lowest_triples(scores: Sequence[Tensor], k: int, min_rank: int) -> list[set[int]]:
    """The k triples of lowest score over all blocks, never leaving a block below `min_rank`.

    Counts are exact: ties go to the lower block index, then the lower triple index, and where fewer
    than k can go, fewer go. Returns the pruned indices of every block.
    """
    ranked = sorted((float(s), b, i) for b, block in enumerate(scores) for i, s in enumerate(block))
    pruned: list[set[int]] = [set() for _ in scores]
    for _, block, triple in ranked:
        if k == 0:
            break
        if len(scores[block]) - len(pruned[block]) > min_rank:
            pruned[block].add(triple)
            k -= 1
    return pruned


def spread_over_blocks(block_scores: Sequence[float], k: int, room: Sequence[int]) -> list[int]:
    """k new triples, one for each of the highest blocks; round again from the top where k exceeds the blocks.

    `room` is how many triples each block may still get. Ties go to the lower block index.
    """
    order = sorted(range(len(block_scores)), key=lambda b: (-block_scores[b], b))
    added = [0] * len(block_scores)
    while k > 0 and any(added[b] < room[b] for b in order):
        for block in order:
            if k > 0 and added[block] < room[block]:
                added[block] += 1
                k -= 1
    return added
