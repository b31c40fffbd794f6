from __future__ import annotations

import pytest

from dynrank_ds.bench import merge
from dynrank_ds.recipe import load_recipe


def test_merging_is_measured_beside_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_HIDDEN", 64)
    monkeypatch.setattr(merge, "_INTERMEDIATE", 96)
    monkeypatch.setattr(merge, "_VOCABULARY", 128)
    figures = {figure.what: figure.text for figure in merge.measure_merge(load_recipe("quickstart"), True)}
    assert list(figures) == [
        "size of the base",
        "copying, until the disk has it",
        "merging with 1 worker",
        "merging with 2 workers",
        "memory with 1 worker, at most",
    ]
    assert "x the speed of the copy" in figures["merging with 1 worker"]
