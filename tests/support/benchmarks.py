"""A few problems of each benchmark, in the layout of the published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROBLEMS = 2
_ADD = "def {name}(a, b):\n    return a {sign} b\n"


def write_benchmarks(folder: Path) -> Path:
    """Write PROBLEMS of gsm8k, math, humaneval and mbpp into `folder`, for `dynrank-eval --data-dir`."""
    signs = {"add": ("+", 5), "multiply": ("*", 6)}
    files: dict[str, list[dict[str, Any]]] = {
        "gsm8k/test.jsonl": [
            {"question": f"What is 2 {sign} 3?", "answer": f"It is {value}.\n#### {value}"}
            for sign, value in signs.values()
        ],
        "math/math500.jsonl": [
            {"problem": f"Find $2 {sign} 3$.", "solution": f"It is \\boxed{{{value}}}.", "answer": str(value)}
            for sign, value in signs.values()
        ],
        "humaneval/HumanEval.jsonl": [
            {
                "task_id": f"HumanEval/{number}",
                "prompt": f'def {name}(a, b):\n    """Return a {sign} b."""\n',
                "entry_point": name,
                "canonical_solution": f"    return a {sign} b\n",
                "test": f"def check(candidate):\n    assert candidate(2, 3) == {value}\n",
            }
            for number, (name, (sign, value)) in enumerate(signs.items())
        ],
        "mbpp/sanitized-mbpp.jsonl": [
            {
                "task_id": number,
                "prompt": f"Write a function to {name} two numbers.",
                "code": _ADD.format(name=name, sign=sign),
                "test_imports": [],
                "test_list": [f"assert {name}(2, 3) == {value}"],
            }
            for number, (name, (sign, value)) in enumerate(signs.items())
        ],
    }
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
