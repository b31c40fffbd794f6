from __future__ import annotations

import torch

from dynrank_ds.ranking.plan import RankPlan, lowest_triples, spread_over_modules


def scores(*modules: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(module, dtype=torch.float64) for module in modules]


def test_the_lowest_triples_go_whatever_their_module() -> None:
    assert lowest_triples(scores([5, 1, 4], [2, 6], [9, 3, 8]), k=3, min_ranks=[1] * 3) == [{1}, {0}, {1}]


def test_exactly_k_go_where_all_scores_are_equal_the_first_module_and_triple_first() -> None:
    assert lowest_triples(scores([0, 0, 0], [0, 0], [0, 0]), k=3, min_ranks=[1] * 3) == [{0, 1}, {0}, set()]


def test_ties_go_to_the_lower_module_then_the_lower_triple() -> None:
    assert lowest_triples(scores([7, 7, 1], [1, 1, 7]), k=2, min_ranks=[1] * 3) == [{2}, {0}]
    assert lowest_triples(scores([7, 7, 1], [1, 1, 7]), k=4, min_ranks=[1] * 3) == [{0, 2}, {0, 1}]


def test_a_module_keeps_its_last_triple_and_the_next_lowest_goes_instead() -> None:
    assert lowest_triples(scores([1, 2], [3, 4, 5]), k=3, min_ranks=[1] * 3) == [{0}, {0, 1}]
    assert lowest_triples(scores([1, 2], [3, 4, 5]), k=3, min_ranks=[0] * 3) == [{0, 1}, {0}]


def test_fewer_go_where_k_exceeds_what_can() -> None:
    assert lowest_triples(scores([1], [2, 3], [4]), k=10, min_ranks=[1] * 3) == [set(), {0}, set()]


def test_the_best_modules_get_one_new_triple_each() -> None:
    assert spread_over_modules([1.0, 4.0, 3.0, 2.0], budget=2, costs=[1] * 4, room=[9] * 4) == [0, 1, 1, 0]


def test_equal_modules_are_served_in_order() -> None:
    assert spread_over_modules([1.0, 1.0, 1.0], budget=2, costs=[1] * 4, room=[9] * 3) == [1, 1, 0]


def test_it_starts_again_at_the_best_module_where_k_exceeds_the_modules() -> None:
    assert spread_over_modules([1.0, 3.0, 2.0], budget=7, costs=[1] * 4, room=[9] * 3) == [2, 3, 2]


def test_a_full_module_is_passed_over_and_what_fits_nowhere_is_not_added() -> None:
    assert spread_over_modules([1.0, 3.0, 2.0], budget=3, costs=[1] * 4, room=[9, 0, 1]) == [2, 0, 1]
    assert spread_over_modules([1.0, 3.0, 2.0], budget=9, costs=[1] * 4, room=[1, 0, 1]) == [1, 0, 1]


def test_a_module_whose_triple_costs_more_than_is_left_is_passed_over() -> None:
    assert spread_over_modules([1.0, 3.0, 2.0], budget=10, costs=[2, 6, 3], room=[9] * 3) == [0, 1, 1]
    assert spread_over_modules([1.0, 3.0, 2.0], budget=13, costs=[2, 6, 3], room=[9] * 3) == [2, 1, 1]
    assert spread_over_modules([1.0, 3.0], budget=5, costs=[6, 6], room=[9] * 2) == [0, 0]


def test_every_module_has_a_minimum_of_its_own() -> None:
    assert lowest_triples(scores([1, 2, 3], [1, 2, 3]), k=6, min_ranks=[3, 1]) == [set(), {0, 1}]


def test_a_plan_gives_ranks_changes_and_pruned_triples() -> None:
    plan = RankPlan(keep=((0, 2), (0, 1), (0,)), new=(1, 0, 2))
    assert plan.ranks == (3, 2, 3)
    assert plan.changed((3, 2, 1)) == [0, 2]
    assert plan.pruned((3, 2, 1)) == [[1], [], []]


def test_the_hash_differs_exactly_where_plans_do() -> None:
    plan = RankPlan(keep=((0, 2), (0,)), new=(1, 0))
    assert plan.sha256() == RankPlan(keep=((0, 2), (0,)), new=(1, 0)).sha256()
    assert plan.sha256() != RankPlan(keep=((0, 1), (0,)), new=(1, 0)).sha256()
    assert plan.sha256() != RankPlan(keep=((0, 2), (0,)), new=(0, 1)).sha256()
