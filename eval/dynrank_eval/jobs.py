"""What to evaluate: tasks with their protocols and problems, checked before any work."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError, RecipeError
from dynrank_eval.protocols import Protocol, load_protocol
from dynrank_eval.tasks import Problem, Task, fingerprint, get_tasks


@dataclass(frozen=True)
class Selection:
    """What to evaluate: the options that all commands share.

    Attributes:
        protocol: None: each task's default.
        skip: leave out so many problems of each task, its first ones.
        limit: only so many problems of each task, from there on; None: all.
        samples: completions per problem; None: the protocol's.
        allow_network: run programs even where the machine cannot keep them off the network.
    """

    tasks: Sequence[str]
    protocol: str | None = None
    data_dir: Path | None = None
    limit: int | None = None
    samples: int | None = None
    allow_network: bool = False
    skip: int = 0


@dataclass(frozen=True)
class Job:
    """A task, how it is asked, and the problems to score.

    Attributes:
        contexts: solved examples before each problem, "" where the protocol has none; None for scoring only.
        known_ids: the task ids of all problems, also of those that are left out.
        samples: completions per problem.
        data: where the problems come from, and which variant of the benchmark they are.
    """

    task: Task
    protocol: Protocol
    problems: list[Problem]
    contexts: list[str] | None
    known_ids: frozenset[str]
    samples: int
    data: dict[str, Any]

    def prompts(self, tokenizer: Any) -> list[str]:
        """Return the prompt of each problem; the tokenizer renders a chat's template."""
        assert self.contexts is not None, "a job for scoring has no prompts"
        form = self.protocol.form
        texts = [problem.text if form is None else problem.forms[form] for problem in self.problems]
        pairs = zip(self.contexts, texts, strict=True)
        return [context + self.protocol.render(text, tokenizer) for context, text in pairs]

    def data_hash(self) -> str:
        """Return the fingerprint of the problems and their references."""
        return fingerprint([[p.task_id, p.text, p.reference] for p in self.problems])


def prepare(selection: Selection, generating: bool, scoring: bool) -> list[Job]:
    """Load the problems of each task and check everything that can be checked before the work.

    Raises:
        RecipeError: a task or protocol that does not exist or does not fit.
        DataError: problems that cannot be read.
        MachineError: this machine cannot score a task.
    """
    if selection.data_dir is not None and not selection.data_dir.is_dir():
        raise DataError(f"--data-dir {selection.data_dir}: there is no such folder.")
    tasks = get_tasks(selection.tasks)
    repeated = [task.name for task, times in Counter(tasks).items() if times > 1]
    if repeated:
        raise RecipeError(f"--task names {repeated[0]} twice; once is enough.")
    jobs = [_prepare_one(task, selection, generating) for task in tasks]
    if scoring:
        for job in jobs:
            job.task.check_machine(job.protocol, selection.allow_network)
    return jobs


def _prepare_one(task: Task, selection: Selection, generating: bool) -> Job:
    protocol = load_protocol(selection.protocol or task.default_protocol, task.name)
    problems = task.load(selection.data_dir)
    if protocol.problem_ids is not None:
        first, last = protocol.problem_ids
        problems = [problem for problem in problems if first <= int(problem.task_id) <= last]
    if not problems:
        raise DataError(f"{task.name}: the data hold no problems for {protocol.name}.")
    ids = Counter(problem.task_id for problem in problems)
    repeated = [task_id for task_id, times in ids.items() if times > 1]
    if repeated:
        raise DataError(f"{task.name}: the data hold the task_id {repeated[0]!r} twice.")
    if selection.skip >= len(problems):
        raise RecipeError(
            f"--skip {selection.skip} leaves no problem of {task.name}, which has {len(problems)}; give less."
        )
    end = None if selection.limit is None else selection.skip + selection.limit
    chosen = slice(selection.skip, end)
    contexts = None
    if generating:
        contexts = [""] * len(problems)
        if protocol.fewshot is not None:
            drawn = not protocol.fewshot.examples
            rows = task.examples(selection.data_dir) if drawn else []
            contexts = protocol.fewshot.contexts(rows, len(problems))
        contexts = contexts[chosen]
    return Job(
        task,
        protocol,
        problems[chosen],
        contexts,
        frozenset(ids),
        selection.samples or protocol.samples,
        {**task.source(selection.data_dir), "problems": len(problems)},
    )
