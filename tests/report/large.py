"""Run directories as large as a 70B model's: 80 layers of 7 linears, or of heads that have ranks of their own.

python -m tests.report.large FOLDER      writes both and their pages, to be looked at
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from dynrank_ds.report import write_report

from .conftest import metric, write_lines

LAYERS = 80
LINEARS = {
    f"{part}.{name}_proj": heads
    for part, names in {
        "self_attn": {"q": 64, "k": 8, "v": 8, "o": 64},
        "mlp": {"gate": 0, "up": 0, "down": 0},
    }.items()
    for name, heads in names.items()
}
"""Heads of each linear of LLaMA-3-70B; 0 where it has none."""


def large_run(run: Path, heads: bool, adjustments: int = 20) -> Path:
    """Write a run whose ranks drift from 4, more upwards in later layers; without a checkpoint."""
    random = np.random.default_rng(0)
    names = [
        f"model.layers.{layer}.{linear}" + (f".blocks.{head}" if heads and count else "")
        for layer in range(LAYERS)
        for linear, count in LINEARS.items()
        for head in range(count if heads and count else 1)
    ]
    layers = np.array([int(name.split(".")[2]) for name in names])
    ranks, lines = np.full(len(names), 4), []
    for number in range(1, adjustments + 1):
        before, scores = ranks, random.lognormal((layers / LAYERS)[:, None], 1.0, (len(names), 1))
        drift = random.random(len(names)) + layers / LAYERS
        ranks = np.clip(ranks + (drift > 1.4) - (drift < 0.45), 1, 24)
        lines.append(
            dict(
                adjustment=number,
                step=number * 100,
                before=dict(zip(names, before.tolist(), strict=True)),
                after=dict(zip(names, ranks.tolist(), strict=True)),
                scores={
                    name: [float(score[0])] * int(rank)
                    for name, score, rank in zip(names, scores, before, strict=True)
                },
            )
        )
    run.mkdir(parents=True)
    write_lines(run / "ranks.jsonl", lines)
    total = int(ranks.sum())
    write_lines(
        run / "metrics.jsonl",
        [
            metric(step, 1.0 + float(np.exp(-step / 400)))
            | {"total_rank_live": total, "total_rank_stored": total}
            for step in range(1, 100 * adjustments + 201, 5)
        ],
    )
    method = {"name": "ard_lora" if heads else "pe_dyra"}
    (run / "recipe.resolved.yaml").write_text(
        json.dumps({"method": method, "model": {"path": "a model of 70B"}})
    )
    return run


if __name__ == "__main__":
    for name, heads in (("linears", False), ("heads", True)):
        print(write_report(large_run(Path(sys.argv[1]) / name, heads)))
