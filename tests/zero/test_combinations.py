"""The table of combinations in the adapters' README: what it says is refused is refused, with that reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import METHODS as KNOWN
from dynrank_ds.recipe import load_recipe
from tests.support.methods import METHODS
from tests.support.recipes import write_recipe

README = Path(__file__).parents[2] / "dynrank_ds/adapters/README.md"
COLUMNS = {
    "ZeRO-2": ("deepspeed.config=zero2",),
    "ZeRO-3": ("deepspeed.config=zero3",),
    "NF4, ZeRO-2": ("deepspeed.config=zero2", "model.quantisation=nf4"),
    "NF4, ZeRO-3": ("deepspeed.config=zero3", "model.quantisation=nf4"),
}


class Cell(NamedTuple):
    method: str
    variant: str
    column: str
    says: str

    @property
    def overrides(self) -> list[str]:
        keys = [key.replace(": ", "=") for key in re.findall(r"`([^`]*)`", self.variant)]
        return [*keys, *COLUMNS[self.column]]


def table() -> list[Cell]:
    """Every cell of the table that begins with "| method | variant |"."""
    text = README.read_text()
    block = text[text.index("| method | variant |") :].split("\n\n", 1)[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    assert head[2:] == list(COLUMNS)
    return [
        Cell(method.strip("`"), variant, column, says)
        for method, variant, *cells in rows
        for column, says in zip(head[2:], cells, strict=True)
    ]


CELLS = table()
REFUSED = [cell for cell in CELLS if cell.says.startswith("refused: ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combinations")
    write_recipe(folder)
    for name in KNOWN:
        section = METHODS.get(name, {"name": name})
        (folder / f"{name}.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": section}))
    return folder


def test_every_method_is_in_the_table_with_every_variant() -> None:
    variants = {cell.variant for cell in CELLS}
    assert {(cell.method, cell.variant) for cell in CELLS} == {(m, v) for m in KNOWN for v in variants}


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: f"{cell.method}, {cell.variant}, {cell.column}")
def test_what_is_refused_is_refused_with_the_reason_of_the_table(folder: Path, cell: Cell) -> None:
    with pytest.raises(RecipeError, match=re.escape(cell.says.removeprefix("refused: "))):
        load_recipe(str(folder / f"{cell.method}.yaml"), cell.overrides)
