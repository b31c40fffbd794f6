"""What tests of `dynrank-eval` ask again and again."""

import json
from pathlib import Path
from typing import Any


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def score_arguments(data: Path, generations: Path) -> list[str]:
    where = ["--data-dir", str(data), "--generations", str(generations)]
    return ["score", "--task", "gsm_symbolic", *where]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
