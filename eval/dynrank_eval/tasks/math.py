"""MATH (Hendrycks et al. 2021): all 5000 test problems, MATH-500, or any file in that layout.

Two graders: the classic string comparison that published scores rest on, and math-verify. The protocol says
which makes the score; results report both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval import verification
from dynrank_eval.answers import grading
from dynrank_eval.answers.reading import math_answers
from dynrank_eval.equivalence import equivalent
from dynrank_eval.extraction import find_answer, last_boxed
from dynrank_eval.jsonl import read_rows
from dynrank_eval.protocols import Protocol
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict
from dynrank_eval.tasks.sources import file_source, find_file, hub_rows
from dynrank_eval.transcriptions import metamath, minerva
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
_GROUPS = (("subject", "subject"), ("subject", "type"), ("level", "level"))
_GRADE = {
    Equality.EQUAL: Verdict.CORRECT,
    Equality.DIFFERENT: Verdict.WRONG,
    Equality.TIMEOUT: Verdict.TIMEOUT,
}


class Math(Task):
    """Rows of `problem`, `solution` and, where there are any, `answer`, `unique_id` or `task_id`."""

    name = "math"
    default_protocol = "dynrank-math-v1"

    def load(self, data_dir: Path | None) -> list[Problem]:
        path = find_file(data_dir, self.name, _FILES)
        if path is not None:
            return _problems(path, read_rows(path, ("problem", "solution")))
        return _problems(
            _HUB, enumerate(hub_rows(self.name, data_dir, _FILES, _HUB, _SUBJECTS, "test"), start=1)
        )

    def source(self, data_dir: Path | None) -> dict[str, str]:
        path = find_file(data_dir, self.name, _FILES)
        return {"hub": _HUB, "variant": "test"} if path is None else file_source(path, path.stem)

    def check_machine(self, protocol: Protocol, allow_network: bool) -> None:
        verification.check(by_sympy="minerva" in protocol.graders)

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        read = _READERS[protocol.reader]
        answers = [read(text, protocol) for text in completions]
        places = [place for place, readings in enumerate(answers) for _ in readings]
        pairs = [
            (problem.reference, reading)
            for problem, readings in zip(problems, answers, strict=True)
            for reading in readings
        ]
        graded: dict[str, list[list[tuple[Verdict, str]]]] = {}
        for name in protocol.graders:
            graded[name] = [[] for _ in problems]
            for place, grade in zip(places, _GRADERS[name](pairs), strict=True):
                graded[name][place].append(grade)
        return [
            _judgement(
                readings, {name: grades[place] for name, grades in graded.items()}, protocol.graders[0]
            )
            for place, readings in enumerate(answers)
        ]


def _judgement(
    readings: Sequence[str], graded: Mapping[str, Sequence[tuple[Verdict, str]]], first: str
) -> Judgement:
    """Judge by the grader `first`; of several readings of an answer the first that is right counts."""
    if not readings:
        return Judgement(Verdict.INVALID, None, dict.fromkeys(graded, False), "")
    right = [verdict is Verdict.CORRECT for verdict, _ in graded[first]]
    chosen = right.index(True) if True in right else 0
    grades = {name: any(verdict is Verdict.CORRECT for verdict, _ in found) for name, found in graded.items()}
    verdict, grader = graded[first][chosen]
    return Judgement(verdict, readings[chosen], grades, grader)


def _by_rules(completion: str, protocol: Protocol) -> str | None:
    (rules,) = protocol.answers.values()
    answer = find_answer(protocol.cut(completion), rules)
    return None if answer is None else _bare(answer)


def _one(answer: str | None) -> tuple[str, ...]:
    return () if answer is None else (answer,)


# Each gives the ways to read an answer, none where there is none.
_READERS: dict[str, Callable[[str, Protocol], tuple[str, ...]]] = {
    "stated": lambda completion, protocol: math_answers(completion),
    "rules": lambda completion, protocol: _one(_by_rules(completion, protocol)),
    "metamath": lambda completion, protocol: _one(metamath.extract_answer(completion)),
    "minerva": lambda completion, protocol: _one(minerva.extract_answer(completion)),
}


# Pairs of a problem's reference and an answer.
_Pairs = Sequence[tuple[Mapping[str, str], str]]


def _by_string(pairs: _Pairs) -> list[tuple[Verdict, str]]:
    return [
        (Verdict.CORRECT if equivalent(reference["answer"], answer) else Verdict.WRONG, "string")
        for reference, answer in pairs
    ]


def _by_math_verify(pairs: _Pairs) -> list[tuple[Verdict, str]]:
    asked = [(reference["answer"], answer) for reference, answer in pairs]
    return [(_GRADE[equality], "math_verify") for equality in verification.compare(asked)]


def _guarded(pairs: _Pairs) -> list[tuple[Verdict, str]]:
    asked = [(reference["answer"], answer) for reference, answer in pairs]
    return [(_GRADE[grade.equality], grade.grader) for grade in grading.grade(asked)]


def _by_minerva(pairs: _Pairs) -> list[tuple[Verdict, str]]:
    normal = [
        (
            minerva.normalize(minerva.gold(reference["solution"]) or reference["answer"]),
            minerva.normalize(answer),
        )
        for reference, answer in pairs
    ]
    return [(_GRADE[equality], "minerva") for equality in verification.compare(normal, by="sympy")]


_GRADERS: dict[str, Callable[[_Pairs], list[tuple[Verdict, str]]]] = {
    "guarded": _guarded,
    "string": _by_string,
    "math_verify": _by_math_verify,
    "minerva": _by_minerva,
}


def _bare(answer: str) -> str:
    r"""Return the answer without math delimiters around it and without \boxed."""
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
        groups = {name: str(row[key]) for name, key in _GROUPS if row.get(key) is not None}
        reference = {"answer": str(answer), "solution": str(row["solution"])}
        problems.append(Problem(task_id, str(row["problem"]), reference, groups))
    return problems
