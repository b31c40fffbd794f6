"""MATH (Hendrycks et al. 2021): all 5000 test problems, MATH-500, or any file in that layout.

Two graders: the classic string comparison that published scores rest on, and math-verify. The protocol says
which makes the score; results report both.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval import verification
from dynrank_eval.equivalence import equivalent
from dynrank_eval.extraction import find_answer, last_boxed
from dynrank_eval.jsonl import read_rows
from dynrank_eval.protocols import Protocol
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict
from dynrank_eval.tasks.sources import find_file, hub_rows
from dynrank_eval.verification import Equality

_FILES = ("math.jsonl", "MATH_test.jsonl", "math500.jsonl", "MATH-500.jsonl", "test.jsonl")
_HUB = "EleutherAI/hendrycks_math"
_SUBJECTS = [
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
]
_GRADE = {
    Equality.EQUAL: Verdict.CORRECT,
    Equality.DIFFERENT: Verdict.WRONG,
    Equality.TIMEOUT: Verdict.TIMEOUT,
}


class Math(Task):
    """Rows of `problem`, `solution` and, where there are any, `answer`, `unique_id` or `task_id`."""

    name = "math"
    default_protocol = "metamath-v1"

    def load(self, data_dir: Path | None) -> list[Problem]:
        path = find_file(data_dir, self.name, _FILES)
        if path is not None:
            return _problems(path, read_rows(path, ("problem", "solution")))
        return _problems(
            _HUB, enumerate(hub_rows(self.name, data_dir, _FILES, _HUB, _SUBJECTS, "test"), start=1)
        )

    def check_machine(self, allow_network: bool) -> None:
        verification.check()

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        (rules,) = protocol.answers.values()
        answers = [find_answer(protocol.cut(text), rules) for text in completions]
        answered = [place for place, answer in enumerate(answers) if answer is not None]
        pairs = [(problems[place].reference["answer"], _bare(answers[place] or "")) for place in answered]
        graded = {name: dict(zip(answered, _GRADERS[name](pairs), strict=True)) for name in protocol.graders}
        judgements = []
        for place, answer in enumerate(answers):
            verdicts = {name: grades.get(place, Verdict.INVALID) for name, grades in graded.items()}
            grades = {name: verdict is Verdict.CORRECT for name, verdict in verdicts.items()}
            judgements.append(Judgement(verdicts[protocol.graders[0]], answer, grades))
        return judgements


def _by_string(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    return [Verdict.CORRECT if equivalent(gold, answer) else Verdict.WRONG for gold, answer in pairs]


def _by_math_verify(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    return [_GRADE[equality] for equality in verification.compare(pairs)]


_GRADERS: dict[str, Callable[[Sequence[tuple[str, str]]], list[Verdict]]] = {
    "string": _by_string,
    "math_verify": _by_math_verify,
}


def _bare(answer: str) -> str:
    r"""The answer without math delimiters around it and without \boxed."""
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if answer.startswith(left) and answer.endswith(right) and len(answer) > len(left) + len(right):
            inner = answer[len(left) : -len(right)].strip()
            if left not in inner.replace("\\$", ""):
                answer = inner.removesuffix(".")
    if answer.startswith("\\boxed"):
        answer = last_boxed(answer) or answer
    return answer


def _problems(source: Path | str, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Problem]:
    problems = []
    for place, (line, row) in enumerate(rows):
        answer = row["answer"] if "answer" in row else last_boxed(str(row["solution"]))
        if not answer:
            raise DataError(f"{source}, line {line}: neither an 'answer' nor a \\boxed one in 'solution'.")
        task_id = str(row.get("unique_id", row.get("task_id", place)))
        problems.append(Problem(task_id, str(row["problem"]), {"answer": str(answer)}))
    return problems
