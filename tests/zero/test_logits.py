"""Logits in chunks under ZeRO-3: the same losses, and one gather of the head for all chunks of a micro-batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynrank_ds.zero.config import load_config
from tests.support.launch import outcomes, run_worker
from tests.support.recipes import STEPS, lines, write_recipe

MICRO_BATCHES = 3
"""Of a process and step: a global batch of 6 on two processes, one sample at a time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with all logits at once and in chunks of 4 rows, and in chunks with the shipped configuration."""
    folder = tmp_path_factory.mktemp("logits")
    write_recipe(folder)
    config = load_config("zero3", bf16=False)
    # DeepSpeed would keep what it needs again soon: the head for the next chunk.
    config["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (folder / "nothing_kept.json").write_text(json.dumps(config))
    run_worker(2, "logits", folder)
    return folder


def test_losses_are_those_of_all_logits_at_once(folder: Path) -> None:
    at_once, chunks, zero3 = (
        lines(folder / name / "metrics.jsonl") for name in ("at_once", "chunks", "zero3")
    )
    assert len(at_once) == len(chunks) == len(zero3) == STEPS
    for expected, *others in zip(at_once, chunks, zero3, strict=True):
        for found in others:
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    ranks = [
        [line["after"] for line in lines(folder / name / "ranks.jsonl")] for name in ("at_once", "chunks")
    ]
    assert ranks[0] == ranks[1] and ranks[0]


@pytest.mark.parametrize("name", ["chunks", "zero3"])
def test_the_head_is_gathered_once_for_all_chunks_of_a_micro_batch(folder: Path, name: str) -> None:
    for process in outcomes(folder / name, "steps", 2):
        assert sum(step["chunks"] for step in process) > 2 * STEPS * MICRO_BATCHES
        assert all(step["gathers"] == MICRO_BATCHES for step in process)
