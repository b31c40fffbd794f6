"""The quickstart's last words: scores before and after, ranks, and where everything lies.

python launcher/summary.py --output runs/quickstart
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dynrank_eval.comparison import compare


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Summarise a quickstart.", epilog=(__doc__ or "").splitlines()[2]
    )
    parser.add_argument("--output", required=True, type=Path, help="the quickstart's folder")
    output: Path = parser.parse_args().output
    before, after = (
        json.loads((output / f"eval-{n}/results.json").read_text())["tasks"] for n in ("base", "tuned")
    )
    print(f"{'task':<22}{'problems':>9}  {'base':<24}{'tuned':<24}McNemar p")
    for pair in compare(output / "eval-base", output / "eval-tuned"):
        scores = f"{_score(before[pair.task]):<24}{_score(after[pair.task]):<24}"
        print(f"{pair.task:<22}{pair.n:>9}  {scores}{pair.p_value:.2g}")
    print(_ranks(output))
    for what, path in {
        "run (metrics, ranks, checkpoints)": "run",
        "adapter (PEFT)": "adapter",
        "merged model": "merged",
        "samples and scores": "eval-tuned",
        "report": "run/report.html",
    }.items():
        print(f"{what:<34}{output / path}")


def _score(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{100 * result['score']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _ranks(output: Path) -> str:
    metrics = [json.loads(line) for line in (output / "run/metrics.jsonl").read_text().splitlines()]
    path = output / "run/ranks.jsonl"
    changes = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    moved = sum(changes[-1]["after"][n] != r for n, r in changes[0]["before"].items()) if changes else 0
    last = metrics[-1]
    minutes = sum(line["seconds"] for line in metrics) / 60
    return (
        f"{len(metrics)} steps in {minutes:.1f} min, total rank {last['total_rank_stored']}, "
        f"{last['trainable_parameters']:,} trainable parameters; "
        f"{len(changes)} adjustments, {moved} modules end at another rank"
    )


if __name__ == "__main__":
    main()
