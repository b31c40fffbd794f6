"""A warning where an adapter hardly leaves its start."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.launch import train
from tests.support.methods import METHODS
from tests.support.recipes import write_recipe


@pytest.mark.parametrize(
    ("method", "factor"), [pytest.param("lora", "lora_B", marks=pytest.mark.slow), ("pe_dyra", "lora_E")]
)
def test_a_factor_that_hardly_moves_is_warned_of_once(method: str, factor: str, tmp_path: Path) -> None:
    """At a hundredth of the method's learning rate, and not at that rate; the warm-up takes 3 steps."""
    recipe = write_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    values["method"] = METHODS.get(method, {"name": method})
    values["train"] |= {"steps": 12, "learning_rate": None}
    recipe.write_text(yaml.safe_dump(values))

    def said(name: str, *overrides: str) -> list[str]:
        processes = train(2, recipe, f"output.dir={tmp_path / name}", *overrides)
        return [line for p in processes for line in p.output.splitlines() if "has hardly moved" in line]

    assert said("default") == []
    (warning,) = said("slow", "train.learning_rate=3e-5")
    assert f"WARNING {factor} has hardly moved: after 5 steps its elements are " in warning
    assert "train.learning_rate 3e-05 will do little: raise it" in warning
