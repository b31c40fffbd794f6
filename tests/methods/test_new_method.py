"""A new method is one file, as .github/CONTRIBUTING.md shows one, and one line in dynrank_ds/methods/__init__.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import METHODS
from dynrank_ds.recipe import load_recipe
from tests.support.documented_method import SOURCE, Greedy, GreedyConfig
from tests.support.launch import run_worker
from tests.support.recipes import lines, write_recipe

GREEDY = {"name": "greedy", "interval": 4}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "greedy", Greedy)  # the one line


def test_a_method_of_one_file_and_one_line_is_a_recipe_section(registered: None, tmp_path: Path) -> None:
    path = str(write_recipe(tmp_path))
    recipe = load_recipe(path, [f"method.{key}={value}" for key, value in GREEDY.items()])
    assert recipe.method == GreedyConfig(interval=4)
    assert "name: greedy\n  interval: 4\n" in recipe.dump()
    with pytest.raises(RecipeError, match=r"unknown key 'method.intervall': did you mean 'interval'?"):
        load_recipe(path, ["method.name=greedy", "method.intervall=2"])


def test_a_method_that_is_not_registered_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method.name is 'greedy': known are lora, pe_dyra, "):
        load_recipe(str(write_recipe(tmp_path)), ["method.name=greedy"])


def test_a_method_of_one_file_and_one_line_trains_and_resumes(tmp_path: Path) -> None:
    """In two processes: stopped after step 10 and resumed, it makes the plans of the run that was not stopped."""
    write_recipe(tmp_path)
    run_worker(2, "new_method", tmp_path)
    whole, resumed = (lines(tmp_path / name / "ranks.jsonl") for name in ("whole", "resumed"))
    assert [line["step"] for line in whole] == [4, 8, 12, 16]
    assert [line["plan_sha256"] for line in resumed] == [line["plan_sha256"] for line in whole]
    assert all(sum(line["after"].values()) == sum(line["before"].values()) for line in whole)
    assert all(score[0] > 0 for line in whole for score in line["scores"].values())
    assert whole[0]["scores"] != whole[1]["scores"]


def test_the_documented_method_has_at_most_60_lines() -> None:
    assert len([line for line in SOURCE.splitlines() if line.strip()]) <= 60
