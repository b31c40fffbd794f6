"""Word problems whose answer is one number."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.extraction import find_answer, parse_number
from dynrank_eval.protocols import Protocol
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict


class NumericTask(Task):
    """Compares the extracted number with the reference, exactly."""

    default_protocol = "metamath-v1"

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        return [_judge(problem, text, protocol) for problem, text in zip(problems, completions, strict=True)]


def _judge(problem: Problem, completion: str, protocol: Protocol) -> Judgement:
    assert protocol.answers, f"{protocol.name} extracts no numbers"
    text = protocol.cut(completion)
    found = []
    for rules in protocol.answers.values():
        answer = find_answer(text, rules)
        found.append(None if answer is None else parse_number(answer))
    right = [number == parse_number(problem.reference["answer"]) for number in found]
    grades = dict(zip(protocol.answers, right, strict=True)) if len(right) > 1 else {}
    if found[0] is None:
        return Judgement(Verdict.INVALID, None, grades)
    return Judgement(Verdict.CORRECT if right[0] else Verdict.WRONG, str(found[0]), grades)


def numeric_problems(source: Path | str, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Problem]:
    """Problems from numbered rows of `question`, `answer` (a number) and, where there is one, `task_id`.

    Without a `task_id` the row's place, from 0, takes its part. `source` names the data in errors.
    """
    problems = []
    for place, (line, row) in enumerate(rows):
        answer = str(row["answer"])
        if parse_number(answer) is None:
            raise DataError(f"{source}, line {line}: the answer {answer!r} is not a number.")
        problems.append(Problem(str(row.get("task_id", place)), str(row["question"]), {"answer": answer}))
    return problems
