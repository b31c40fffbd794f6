"""Completions from a file, whoever generated them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.jobs import Job
from dynrank_eval.jsonl import read_rows
from dynrank_eval.tasks import TASKS, task_name
from dynrank_eval.tasks.code import WholeProgram


@dataclass(frozen=True)
class GivenCompletion:
    """A completion, and what is known of how it was generated.

    Attributes:
        max_new_tokens: the limit of new tokens.
        truncated: whether it ended at that limit.
    """

    text: str
    prompt: str | None = None
    tokens: int | None = None
    max_new_tokens: int | None = None
    truncated: bool | None = None


def read_completions(path: Path, jobs: Sequence[Job]) -> list[list[GivenCompletion]]:
    """Return the completions for each job: those of its first problem, of the second, and so on.

    Rows hold `task_id` and `completion`, or as in EvalPlus' files `solution`, a whole program; where there are several
    tasks `task` as well; optionally `prompt`, `tokens`, `max_new_tokens` and `truncated`. A samples.jsonl is such a
    file. Rows of other tasks, and of problems beyond the limit, are left out.

    Raises:
        DataError: a malformed line, an unknown task or task_id, too many or too few completions of a problem.
    """
    by_name = {job.task.name: job for job in jobs}
    found: dict[tuple[str, str], list[GivenCompletion]] = defaultdict(list)
    for line, row in read_rows(path, ("task_id",)):
        job = by_name.get(_task_name(path, line, row, jobs))
        if job is None:
            continue
        task_id = str(row["task_id"])
        if task_id not in job.known_ids:
            raise DataError(
                f"{path}, line {line}: {job.task.name} has no task_id {task_id!r} among its {len(job.known_ids)} "
                "problems; are the completions of another benchmark, or another version of it?"
            )
        if len(found[job.task.name, task_id]) == job.samples:
            raise DataError(
                f"{path}, line {line}: the task_id {task_id!r} was there {_times(job.samples)} before; "
                "give each one once, or say with --n how many completions each problem has."
            )
        found[job.task.name, task_id].append(_completion(path, line, row))
    for job in jobs:
        lacking = [p.task_id for p in job.problems if len(found[job.task.name, p.task_id]) < job.samples]
        if lacking:
            raise DataError(
                f"{path} lacks completions for {len(lacking)} of {len(job.problems)} problems of "
                f"{job.task.name}, the first being {lacking[0]!r}; --limit N scores the first N only."
            )
    return [
        [given for problem in job.problems for given in found[job.task.name, problem.task_id]] for job in jobs
    ]


def _task_name(path: Path, line: int, row: dict[str, Any], jobs: Sequence[Job]) -> str:
    if "task" not in row:
        if len(jobs) > 1:
            raise DataError(f"{path}, line {line} lacks the key 'task', which several tasks need.")
        return jobs[0].task.name
    name = task_name(str(row["task"]))
    if name not in TASKS:
        raise DataError(
            f"{path}, line {line}: there is no task {str(row['task'])[:60]!r}; known are {', '.join(TASKS)}."
        )
    return name


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _completion(path: Path, line: int, row: dict[str, Any]) -> GivenCompletion:
    if ("completion" in row) == ("solution" in row):
        held = "both" if "completion" in row else "neither"
        raise DataError(
            f"{path}, line {line} has {held} of the keys 'completion' and 'solution' (a whole program); give one."
        )
    text, prompt = row.get("completion", row.get("solution")), row.get("prompt")
    counts, truncated = [row.get("tokens"), row.get("max_new_tokens")], row.get("truncated")
    if not isinstance(text, str) or not isinstance(prompt, str | None):
        raise DataError(f"{path}, line {line}: 'completion', 'solution' and 'prompt' must be texts.")
    for key, count in zip(("tokens", "max_new_tokens"), counts, strict=True):
        if not isinstance(count, int | None) or isinstance(count, bool):
            raise DataError(f"{path}, line {line}: {key!r} is {count!r}, not a whole number.")
    if not isinstance(truncated, bool | None):
        raise DataError(f"{path}, line {line}: 'truncated' is {truncated!r}, not true or false.")
    given = text if "completion" in row else WholeProgram(text)
    return GivenCompletion(given, prompt, row.get("tokens"), row.get("max_new_tokens"), truncated)
