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
    """Of every module, when the run began."""
    step: int
    total_steps: int


@dataclass(frozen=True)
class RankPlan:
    """Per module: which triples stay, in ascending order, and how many new ones are appended behind them.

    `masked` holds, per module, triples as they stand after the plan whose lora_E is set to zero and may move
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
        """Return the modules whose triples the plan removes or adds to, given the ranks before it."""
        return [b for b, rank in enumerate(ranks) if self.new[b] or len(self.keep[b]) != rank]

    def pruned(self, ranks: Sequence[int]) -> list[list[int]]:
        """Return per module the indices of the pruned triples."""
        return [sorted(set(range(rank)) - set(kept)) for rank, kept in zip(ranks, self.keep, strict=True)]

    def sha256(self) -> str:
        """Return the plan's hash, by which processes compare their plans."""
        return hashlib.sha256(repr((self.keep, self.new, self.masked)).encode()).hexdigest()


def lowest_triples(scores: Sequence[Tensor], k: int, min_ranks: Sequence[int]) -> list[set[int]]:
    """Return the k triples of lowest score over all modules, never leaving a module below its minimum.

    Counts are exact: ties go to the lower module index, then the lower triple index, and where fewer
    than k can go, fewer go. Returns the pruned indices of every module.
    """
    ranked = sorted((float(s), b, i) for b, module in enumerate(scores) for i, s in enumerate(module))
    pruned: list[set[int]] = [set() for _ in scores]
    for _, module, triple in ranked:
        if k == 0:
            break
        if len(scores[module]) - len(pruned[module]) > min_ranks[module]:
            pruned[module].add(triple)
            k -= 1
    return pruned


def kept_triples(scores: Sequence[Tensor], pruned: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Return per module, the triples that are not pruned, in ascending order."""
    return tuple(
        tuple(i for i in range(len(module)) if i not in gone)
        for module, gone in zip(scores, pruned, strict=True)
    )


def spread_over_modules(
    module_scores: Sequence[float], budget: int, costs: Sequence[int], room: Sequence[int]
) -> list[int]:
    """Return the new triples per module: one for each of the highest modules, repeated until `budget` is used.

    `costs` is what a triple of each module takes of `budget` (1 each where ranks are conserved), `room` how many
    triples each module may still get. Ties go to the lower module index.
    """
    order = sorted(range(len(module_scores)), key=lambda b: (-module_scores[b], b))
    added = [0] * len(module_scores)
    while any(added[b] < room[b] and costs[b] <= budget for b in order):
        for module in order:
            if added[module] < room[module] and costs[module] <= budget:
                added[module] += 1
                budget -= costs[module]
    return added
