"""Word problems whose answer is one number."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.extraction import answer_number, parse_number
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
    assert protocol.answer_marker is not None, f"{protocol.name} extracts no numbers"
    found = answer_number(protocol.cut(completion), protocol.answer_marker)
    if found is None:
        return Judgement(Verdict.INVALID, None)
    right = found == parse_number(problem.reference["answer"])
    return Judgement(Verdict.CORRECT if right else Verdict.WRONG, str(found))


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
