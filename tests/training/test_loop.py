"""What the loop decides by itself; whole runs are tested in tests/zero."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynrank_ds.training.loop import Trainer


@pytest.mark.parametrize(
    ("max_rank", "rank", "sides", "expected"),
    [
        (None, 8, (900, 900), 512),
        (None, 600, (900, 900), 600),
        (16, 8, (900, 900), 16),
        (None, 8, (900, 7), 7),
    ],
)
def test_a_module_may_grow_to_512_or_the_rank_it_begins_with_or_what_the_recipe_says(
    max_rank: int | None, rank: int, sides: tuple[int, int], expected: int
) -> None:
    trainer: Any = SimpleNamespace(
        recipe=SimpleNamespace(adapter=SimpleNamespace(max_rank=max_rank, rank=rank))
    )
    assert Trainer._max_rank(trainer, *sides) == expected
