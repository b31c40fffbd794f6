from __future__ import annotations

import math
from typing import Any

import pytest

from dynrank_ds.recipe_sections import TrainSection
from dynrank_ds.training.schedule import learning_rate


def rates(total: int, **train: Any) -> list[float]:
    section = TrainSection(steps=total, global_batch_size=1, learning_rate=0.8, **train)
    return [learning_rate(section, step, total) for step in range(1, total + 1)]


def test_linear_falls_by_equal_parts_and_ends_one_part_above_zero() -> None:
    assert rates(4, schedule="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_warm_up_rises_from_one_part_to_the_whole() -> None:
    assert rates(8, schedule="linear", warmup=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.6, 0.4, 0.2])


def test_warm_up_may_be_a_fraction_of_training() -> None:
    assert rates(8, schedule="linear", warmup=0.5) == rates(8, schedule="linear", warmup=4)


def test_cosine_is_half_way_in_the_middle() -> None:
    expected = [0.4 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates(4, schedule="cosine") == pytest.approx(expected)
    assert rates(4, schedule="cosine")[2] == pytest.approx(0.4)


def test_constant_stays_after_warm_up() -> None:
    assert rates(5, schedule="constant", warmup=2) == pytest.approx([0.4, 0.8, 0.8, 0.8, 0.8])


def test_training_that_is_warm_up_throughout_reaches_the_whole_at_its_end() -> None:
    assert rates(4, schedule="linear", warmup=4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
