"""What a run directory says about the run's course."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynrank_ds.checkpoint.files import BEST, STEP, complete_checkpoints, newest_checkpoint, read_state
from dynrank_ds.errors import RunError
from dynrank_ds.files import read_json

_EVALUATIONS = ("eval", "eval/all")
"""Folders of a run in which its scores are looked for; the second is of jobs that launcher/slurm/submit.py made."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """The logs of a run, and what its newest checkpoint says.

    Attributes:
        metrics: the lines of metrics.jsonl, by step; empty where no step was finished.
        adjustments: the lines of ranks.jsonl, by step; empty for a fixed rank, or before the first adjustment.
        start, end: the rank of every module at the beginning and now; empty where neither an adjustment nor a
            checkpoint was written.
        checkpoint: the newest checkpoint; None where none was written.
        recipe: with every default; {} where the run did not write it.
        state: what state.json says of how the run stands or ended; {} before training began.
        evaluation: the run's output folder of dynrank-eval; None where there is none.
        scores: {task: (score, low, high)} of the evaluation, shares of 1.
    """

    name: str
    metrics: list[dict[str, Any]]
    adjustments: list[dict[str, Any]]
    start: dict[str, int]
    end: dict[str, int]
    method: str
    base_model: str
    checkpoint: Path | None
    recipe: dict[str, Any]
    state: dict[str, Any]
    evaluation: Path | None
    scores: dict[str, tuple[float, float, float]]


def read_run(run: Path) -> RunRecord:
    """Read a run directory, of a run that is still training or was killed too.

    Raises:
        RunError: the folder holds no run, its newest checkpoint is damaged, or a line cannot be read.
    """
    recipe = _recipe(run)
    metrics = _lines_by_step(run / "metrics.jsonl")
    if not metrics and recipe is None:
        raise RunError(
            f"{run / 'metrics.jsonl'} does not exist or is empty: name the folder of a training run"
        )
    adjustments = _lines_by_step(run / "ranks.jsonl")
    written = complete_checkpoints(run, STEP) or complete_checkpoints(run, BEST)
    checkpoint = newest_checkpoint(run) if written else None
    saved = read_state(checkpoint) if checkpoint else {}
    ranks = {module: shape["rank"] for module, shape in saved.get("blocks", {}).items()}
    evaluation = next((run / e for e in _EVALUATIONS if (run / e / "results.json").is_file()), None)
    return RunRecord(
        name=run.resolve().name,
        metrics=metrics,
        adjustments=adjustments,
        start=adjustments[0]["before"] if adjustments else ranks,
        end=adjustments[-1]["after"] if adjustments else ranks,
        method=saved.get("method") or (recipe or {}).get("method", {}).get("name", "unknown"),
        base_model=saved.get("base_model") or (recipe or {}).get("model", {}).get("path", "unknown"),
        checkpoint=checkpoint,
        recipe=recipe or {},
        state=read_json(run / "state.json") if (run / "state.json").is_file() else {},
        evaluation=evaluation,
        scores=_scores(evaluation / "results.json") if evaluation else {},
    )


def _recipe(run: Path) -> dict[str, Any] | None:
    path = run / "recipe.resolved.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else None


def _scores(path: Path) -> dict[str, tuple[float, float, float]]:
    tasks: dict[str, Any] = read_json(path)["tasks"]
    return {name: (task["score"], *task["interval"]) for name, task in tasks.items()}


def _lines_by_step(path: Path) -> list[dict[str, Any]]:
    """Return the lines in the order of their steps; of a step that a resumed run did again, the later line."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}, is not JSON ({error})") from error
            logger.warning("%s: the last line is cut short (a killed run) and left out", path)
            continue
        if not entry.get("discarded"):  # logged under the step before, whose line it would replace
            found[entry["step"]] = entry
    return [found[step] for step in sorted(found)]
