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
    initial_rank: int
    """Of every block, when the run began."""
    step: int
    total_steps: int


@dataclass(frozen=True)
class RankPlan:
    """Per block: which triples stay, in ascending order, and how many new ones are appended behind them.

    `masked` holds, per block, triples as they stand after the plan whose lora_E is set to zero and may move
    again from the next step on (AdaLoRA, dynamic DoRA); empty where nothing is masked.
    """

    keep: tuple[tuple[int, ...], ...]
    new: tuple[int, ...]
    masked: tuple[tuple[int, ...], ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks after the plan."""
        return tuple(len(kept) + added for kept, added in zip(self.keep, self.new, strict=True))

    def changed(self, ranks: Sequence[int]) -> list[int]:
        """Blocks whose triples the plan removes or adds to, given the ranks before it."""
        return [b for b, rank in enumerate(ranks) if self.new[b] or len(self.keep[b]) != rank]

    def pruned(self, ranks: Sequence[int]) -> list[list[int]]:
        """Per block, the indices of the triples that go."""
        return [sorted(set(range(rank)) - set(kept)) for rank, kept in zip(ranks, self.keep, strict=True)]

    def sha256(self) -> str:
        """Equal on all processes exactly if their plans are."""
        return hashlib.sha256(repr((self.keep, self.new, self.masked)).encode()).hexdigest()


def lowest_triples(scores: Sequence[Tensor], k: int, min_ranks: Sequence[int]) -> list[set[int]]:
    """The k triples of lowest score over all blocks, never leaving a block below its minimum.

    Counts are exact: ties go to the lower block index, then the lower triple index, and where fewer
    than k can go, fewer go. Returns the pruned indices of every block.
    """
    ranked = sorted((float(s), b, i) for b, block in enumerate(scores) for i, s in enumerate(block))
    pruned: list[set[int]] = [set() for _ in scores]
    for _, block, triple in ranked:
        if k == 0:
            break
        if len(scores[block]) - len(pruned[block]) > min_ranks[block]:
            pruned[block].add(triple)
            k -= 1
    return pruned


def kept_triples(scores: Sequence[Tensor], pruned: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Per block, the triples that are not pruned, in ascending order."""
    return tuple(
        tuple(i for i in range(len(block)) if i not in gone)
        for block, gone in zip(scores, pruned, strict=True)
    )


def spread_over_blocks(
    block_scores: Sequence[float], budget: int, costs: Sequence[int], room: Sequence[int]
) -> list[int]:
    """New triples: one for each of the highest blocks, round again from the top, while the budget lasts.

    `costs` is what a triple of each block takes of `budget` (1 each where ranks are conserved), `room` how many
    triples each block may still get. Ties go to the lower block index.
    """
    order = sorted(range(len(block_scores)), key=lambda b: (-block_scores[b], b))
    added = [0] * len(block_scores)
    while any(added[b] < room[b] and costs[b] <= budget for b in order):
        for block in order:
            if added[block] < room[block] and costs[block] <= budget:
                added[block] += 1
                budget -= costs[block]
    return added
