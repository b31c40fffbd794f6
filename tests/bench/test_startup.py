"""The benchmark of starting up."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dynrank_ds.bench.startup import PARTS, _Parts
from tests.support.launch import start_processes, wait
from tests.support.recipes import write_recipe


def test_a_part_inside_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(
        [0.0, 1.0, 6.0, 7.0, 12.0, 14.0]
    )  # outer begins, inner twice from 1 to 6 and 7 to 12, outer ends
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    parts = _Parts()
    inner = parts.timed("inner", lambda: None)
    with parts.part("outer"):
        inner()
        inner()
    assert parts.seconds == {"inner": 10.0, "outer": 4.0}


@pytest.mark.slow
def test_every_part_of_both_starts_is_timed(tmp_path: Path) -> None:
    command = ["-m", "dynrank_ds.bench", "startup", "--quick", "--recipe", str(write_recipe(tmp_path))]
    [process] = start_processes(1, [*command, "--json", str(tmp_path / "startup.json")], tmp_path / "logs")
    wait([process])
    assert process.returncode == 0, process.output
    figures = json.loads((tmp_path / "startup.json").read_text())["benchmarks"]["startup"]
    starts = {f["values"]["start"]: f["values"]["seconds"] for f in figures if f["values"]}
    assert list(starts) == ["first start", "start 2"]
    for seconds in starts.values():
        assert {"imports", "process group", "first step", *PARTS} <= set(seconds)
        assert all(found > 0 for found in seconds.values())
