"""No more programs at a time than CPUs that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynrank_eval import cpus


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1)]
)
def test_affinity_and_quota_count(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cpus, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpus.usable_cpus() == expected
    monkeypatch.setattr(cpus, "_QUOTA", tmp_path / "nowhere")
    assert cpus.usable_cpus() == 8
