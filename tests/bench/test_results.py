"""The figures that the page of benchmarks shows are those of the files beside it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from dynrank_ds.bench.cli import BENCHMARKS

FOLDER = Path(__file__).parents[2] / "dynrank_ds" / "bench"
PAGE = (FOLDER / "README.md").read_text()
RESULTS = sorted((FOLDER / "results").glob("*.json"))


def table(path: Path) -> str:
    """Return what the page shows of a file of results."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    figures = [f for found in benchmarks.values() for f in found]
    head = "ours / theirs | median [95 % interval]" if "peers" in benchmarks else "figure | value"
    rows = [f"| {figure['what']} | {' '.join(figure['text'].split())} |" for figure in figures]
    return "\n".join([f"| {head} |", "|---|---|", *rows])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_shows_a_file_whole_and_with_its_command(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["machine"]["cpu"] and content["versions"]["torch"]
    assert f"`{content['command']}`" in PAGE
    assert set(content["benchmarks"]) <= set(shlex.split(content["command"])) & set(BENCHMARKS)
    assert f"<!-- results/{path.name} -->\n{table(path)}\n" in PAGE


def test_the_page_shows_nothing_else() -> None:
    shown = re.findall(r"<!-- results/(.+) -->", PAGE)
    assert shown == [path.name for path in RESULTS]


def test_every_benchmark_is_on_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ", PAGE, flags=re.MULTILINE)
    assert sorted(rows) == sorted(BENCHMARKS)
