"""The table of combinations in the adapters' README: what it says works is trained, what it refuses is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import METHODS as KNOWN
from dynrank_ds.recipe import load_recipe
from tests.support.launch import run_worker
from tests.support.methods import METHODS
from tests.support.recipes import lines, write_recipe

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
WORKING = [cell for cell in CELLS if cell.says == "works"]
REFUSED = [cell for cell in CELLS if cell.says != "works"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combinations")
    write_recipe(folder)
    for name in KNOWN:
        section = METHODS.get(name, {"name": name})
        (folder / f"{name}.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": section}))
    return folder


def trained(folder: Path, cells: list[Cell]) -> None:
    """Train the cells, and look at what each run left."""
    outputs = {f"{cell.method}:{','.join(cell.overrides)}": cell for cell in cells}
    run_worker(2, "combinations", folder, *outputs)
    for name, cell in outputs.items():
        losses = [line["loss"] for line in lines(folder / name / "metrics.jsonl")]
        assert len(losses) == 20 and min(losses[10:]) < losses[0], cell
        assert (folder / name / "adapter" / "adapter_model.safetensors").is_file(), cell


def test_every_method_is_in_the_table_with_every_variant() -> None:
    variants = {cell.variant for cell in CELLS}
    assert {(cell.method, cell.variant) for cell in CELLS} == {(m, v) for m in KNOWN for v in variants}


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: f"{cell.method}, {cell.variant}, {cell.column}")
def test_what_is_refused_is_refused_with_the_reason_of_the_table(folder: Path, cell: Cell) -> None:
    assert cell.says.startswith("refused: ")
    with pytest.raises(RecipeError, match=re.escape(cell.says.removeprefix("refused: "))):
        load_recipe(str(folder / f"{cell.method}.yaml"), cell.overrides)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({cell.method for cell in WORKING}))
def test_all_that_the_table_says_works_trains(folder: Path, method: str) -> None:
    trained(folder, [cell for cell in WORKING if cell.method == method])
