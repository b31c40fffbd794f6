"""A study of seconds, and records as its runs would leave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dynrank_ds.study.definition import Run, Split, Study
from dynrank_ds.study.records import Facts, Record, TaskScore, read_record, settings, write_record
from tests.support.recipes import write_recipe

PROBLEMS = 8


def write_study(folder: Path, **changes: Any) -> Path:
    """Write study.yaml in `folder`: LoRA at two learning rates, and PE-DyRA at one, resized; 3 and 5 problems."""
    recipe = str(write_recipe(folder))
    rows = [
        {"task_id": f"gsm_symbolic-{i}", "question": f"{i} + 1?", "answer": str(i + 1)}
        for i in range(PROBLEMS)
    ]
    (folder / "gsm_symbolic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"tasks": ["gsm_symbolic"], "data_dir": str(folder)}
    study = {
        "about": "A study of seconds",
        "output": str(folder / "runs"),
        "results": str(folder / "results"),
        "overrides": {"train.steps": 8},
        "scoring": ["--engine", "hf", "--max-new-tokens", "4"],
        "reference": "lora",
        "tuning": {**split, "limit": 3, "seeds": [1]},
        "final": {**split, "skip": 3, "seeds": [1, 2]},
        "arms": {
            "lora": {
                "recipe": recipe,
                "overrides": {"method.name": "lora"},
                "grid": {"train.learning_rate": [1e-3, 1e-2]},
            },
            "pe_dyra": {
                "recipe": recipe,
                "overrides": {"method.t_f": 1},
                "grid": {"train.learning_rate": [1e-3]},
                "resize": {"parameters": 4000},
            },
        },
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def add_scores(
    study: Study,
    run: Run,
    split: Split,
    shares: Sequence[float],
    parameters: int = 4000,
    diverged: str | None = None,
) -> None:
    """Write or extend the record of a run that solved these shares."""
    facts = Facts(
        recipe_sha256="0",
        identity={},
        environment={},
        machine={},
        steps=8,
        seconds=60.0,
        peak_parameters=parameters,
        parameters=parameters,
        ranks={"q_proj": [4, 4]},
        loss=1.0,
        diverged=diverged,
    )
    record = read_record(study, run) or Record(**settings(study, run), facts=facts)
    score = TaskScore(protocol="dynrank-math-v1", data_hash="0", shares=list(shares))
    scores = {} if diverged else {**record.scores, split: {"gsm_symbolic": score}}
    write_record(study, run, record.model_copy(update={"scores": scores}))
