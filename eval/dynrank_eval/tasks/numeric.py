"""Word problems whose answer is one number."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.answers.numbers import read_number
from dynrank_eval.answers.reading import number_answer
from dynrank_eval.extraction import find_answer, parse_number
from dynrank_eval.protocols import Protocol
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict
from dynrank_eval.transcriptions import lm_eval, metamath


class NumericTask(Task):
    """Compares the answer's number with the reference, exactly."""

    default_protocol = "dynrank-math-v1"

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        judge_one = _READERS[protocol.reader]
        return [
            judge_one(problem, text, protocol) for problem, text in zip(problems, completions, strict=True)
        ]


def _stated(problem: Problem, completion: str, protocol: Protocol) -> Judgement:
    gold, answer = read_number(problem.reference["answer"]), number_answer(completion)
    assert gold is not None and gold.values, "the reference was checked when it was loaded"
    if answer is None:
        return Judgement(Verdict.INVALID, None, grader="value")
    right = bool(gold.values & answer.reading.values)
    return Judgement(
        Verdict.CORRECT if right else Verdict.WRONG, str(answer.reading) or answer.text, grader="value"
    )


def _by_rules(problem: Problem, completion: str, protocol: Protocol) -> Judgement:
    assert protocol.answers, f"{protocol.name} extracts no numbers"
    text = protocol.cut(completion)
    found = []
    for rules in protocol.answers.values():
        answer = find_answer(text, rules)
        found.append(None if answer is None else parse_number(answer))
    right = [number == parse_number(problem.reference["answer"]) for number in found]
    grades = dict(zip(protocol.answers, right, strict=True)) if len(right) > 1 else {}
    if found[0] is None:
        return Judgement(Verdict.INVALID, None, grades, grader="value")
    return Judgement(Verdict.CORRECT if right[0] else Verdict.WRONG, str(found[0]), grades, grader="value")


def _by_metamath(problem: Problem, completion: str, protocol: Protocol) -> Judgement:
    answer = metamath.extract_number(completion)
    if answer is None:
        return Judgement(Verdict.INVALID, None, grader="metamath")
    right = metamath.same_number(problem.reference["answer"], answer)
    return Judgement(Verdict.CORRECT if right else Verdict.WRONG, str(answer), grader="metamath")


def _by_lm_eval(problem: Problem, completion: str, protocol: Protocol) -> Judgement:
    pattern = lm_eval.STRICT if protocol.reader == "lm_eval_gsm8k" else lm_eval.STRICT_COT
    found = {
        "strict": lm_eval.first(pattern, completion),
        "flexible": lm_eval.last(lm_eval.FLEXIBLE, completion),
    }
    grades = {way: lm_eval.exact_match(answer, problem.reference["answer"]) for way, answer in found.items()}
    if found["strict"] == lm_eval.NOTHING:
        return Judgement(Verdict.INVALID, None, grades, grader="exact_match")
    verdict = Verdict.CORRECT if grades["strict"] else Verdict.WRONG
    return Judgement(verdict, found["strict"], grades, grader="exact_match")


_READERS: dict[str, Callable[[Problem, str, Protocol], Judgement]] = {
    "stated": _stated,
    "rules": _by_rules,
    "metamath": _by_metamath,
    "lm_eval_gsm8k": _by_lm_eval,
    "lm_eval_gsm8k_cot": _by_lm_eval,
}


def numeric_problems(source: Path | str, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Problem]:
    """Make problems of numbered rows of `question`, `answer` (a number) and, where there is one, `task_id`.

    Without a `task_id` the row's place, from 0, takes its part. `source` names the data in errors.
    """
    problems = []
    for place, (line, row) in enumerate(rows):
        answer = str(row["answer"])
        gold = read_number(answer)
        if gold is None or not gold.values:
            raise DataError(f"{source}, line {line}: the answer {answer!r} is not a number.")
        problems.append(Problem(str(row.get("task_id", place)), str(row["question"]), {"answer": answer}))
    return problems
