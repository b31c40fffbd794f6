"""Ranks from scores of whole modules, under a budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def least_ranks(costs: Sequence[int], budget: float) -> list[int]:
    """Return rank 1 for every module.

    Raises:
        ValueError: that alone is above the budget.
    """
    if sum(costs) > budget:
        raise ValueError(f"rank 1 in each of {len(costs)} modules takes {sum(costs)}, more than {budget:g}")
    return [1] * len(costs)


def ranks_by_score(
    scores: Sequence[float], costs: Sequence[int], limits: Sequence[int], budget: float
) -> list[int]:
    """Return the ranks r that minimise sum_l (G_l / r_l)^2 with sum_l c_l r_l within the budget.

    The sum is what Theorem 3.1 of PE-DyRA minimises, so that without limits r_l is proportional to (G_l^2 / c_l)^(1/3).
    Triples are given one at a time to the module with the largest decrease for its cost; it is convex in every r_l, so
    that with equal costs the result is exact, and otherwise within one triple of the budget.

    Args:
        scores: G_l, not negative.
        costs: c_l of a triple.
        limits: largest ranks.
        budget: of the costs.

    Raises:
        ValueError: the budget does not give every module a triple.
    """
    ranks = least_ranks(costs, budget)
    left = budget - sum(costs)

    def gain(module: int) -> float:
        rank = ranks[module]
        return scores[module] ** 2 * (1 / rank**2 - 1 / (rank + 1) ** 2) / costs[module]

    waiting = [(-gain(module), module) for module in range(len(ranks)) if ranks[module] < limits[module]]
    heapq.heapify(waiting)
    while waiting:
        _, module = heapq.heappop(waiting)
        if costs[module] > left:
            continue
        ranks[module] += 1
        left -= costs[module]
        if ranks[module] < limits[module]:
            heapq.heappush(waiting, (-gain(module), module))
    return ranks


def ranks_by_component(
    shares: Sequence[Sequence[float]], costs: Sequence[int], limits: Sequence[int], budget: float
) -> list[int]:
    """Return ranks by the largest components of all modules together, as EVA does (Paischer et al., 2024).

    Args:
        shares: per module, the share of its variance that each component explains, descending.
        costs: of a triple.
        limits: largest ranks.
        budget: of the costs; components follow one another by their share until it is used.

    Raises:
        ValueError: the budget does not give every module a triple.
    """
    ranks = least_ranks(costs, budget)
    left = budget - sum(costs)
    components = [
        (-share, module, number)
        for module, of_module in enumerate(shares)
        for number, share in enumerate(of_module[: limits[module]])
        if number > 0  # every module has its first
    ]
    for _, module, _ in sorted(components):
        if costs[module] <= left:
            ranks[module] += 1
            left -= costs[module]
    return ranks
