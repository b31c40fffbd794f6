"""From problems to results. Generating and scoring meet only in `Generation`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError, RecipeError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.protocols import Protocol, load_protocol
from dynrank_eval.statistics import wilson_interval
from dynrank_eval.tasks import Problem, Task, Verdict, fingerprint, get_task


@dataclass(frozen=True)
class Job:
    """A task, how it is asked, and the problems to score (`known_ids` holds those beyond the limit too)."""

    task: Task
    protocol: Protocol
    problems: list[Problem]
    known_ids: frozenset[str]

    def prompts(self) -> list[str]:
        return [self.protocol.render(problem.text) for problem in self.problems]


@dataclass(frozen=True)
class Generation:
    """A completion from anywhere; prompt and token count where they are known."""

    completion: str
    prompt: str | None
    tokens: int | None


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl."""

    task: str
    task_id: str
    prompt: str | None
    completion: str
    tokens: int | None
    extracted: str | None
    verdict: Verdict


def prepare(
    task_names: Sequence[str], protocol_name: str | None, data_dir: Path | None, limit: int | None
) -> list[Job]:
    """Loads the problems of each task and checks everything that can be checked before generating."""
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir}: there is no such folder.")
    tasks = [get_task(name) for name in task_names]
    repeated = [name for name, times in Counter(task_names).items() if times > 1]
    if repeated:
        raise RecipeError(f"--task names {repeated[0]} twice; once is enough.")
    jobs = [_prepare_one(task, protocol_name, data_dir, limit) for task in tasks]
    for job in jobs:
        job.task.check_machine()
    return jobs


def _prepare_one(task: Task, protocol_name: str | None, data_dir: Path | None, limit: int | None) -> Job:
    protocol = load_protocol(protocol_name or task.default_protocol)
    if task.name not in protocol.tasks:
        raise RecipeError(
            f"--protocol {protocol.name} does not fit --task {task.name}; "
            f"it is for {', '.join(protocol.tasks)}."
        )
    problems = task.load(data_dir)
    if not problems:
        raise DataError(f"{task.name}: the data hold no problems.")
    ids = Counter(problem.task_id for problem in problems)
    repeated = [task_id for task_id, times in ids.items() if times > 1]
    if repeated:
        raise DataError(f"{task.name}: the data hold the task_id {repeated[0]!r} twice.")
    return Job(task, protocol, problems[:limit], frozenset(ids))


def read_generations(path: Path, jobs: Sequence[Job]) -> list[list[Generation]]:
    """The completions for each job, in the order of its problems.

    Rows hold `task_id` and `completion`, where there are several tasks `task` too, and optionally `prompt`
    and `tokens`: a samples.jsonl is such a file. Rows of other tasks, and of problems beyond the limit, are
    left out.

    Raises:
        DataError: a malformed line, an unknown or repeated task_id, or a problem without a completion.
    """
    by_name = {job.task.name: job for job in jobs}
    found: dict[tuple[str, str], Generation] = {}
    for line, row in read_rows(path, ("task_id", "completion")):
        if "task" not in row and len(jobs) > 1:
            raise DataError(f"{path}, line {line} lacks the key 'task', which several tasks need.")
        name = row.get("task", jobs[0].task.name)
        if name not in by_name:
            continue
        key = name, str(row["task_id"])
        if key[1] not in by_name[name].known_ids:
            raise DataError(f"{path}, line {line}: {name} has no task_id {key[1]!r}.")
        if key in found:
            raise DataError(
                f"{path}, line {line}: the task_id {key[1]!r} was there before; give each one once."
            )
        found[key] = _generation(path, line, row)
    for job in jobs:
        missing = [p.task_id for p in job.problems if (job.task.name, p.task_id) not in found]
        if missing:
            raise DataError(
                f"{path} lacks completions for {len(missing)} of {len(job.problems)} problems of "
                f"{job.task.name}, the first being {missing[0]!r}; --limit N scores the first N only."
            )
    return [[found[job.task.name, problem.task_id] for problem in job.problems] for job in jobs]


def _generation(path: Path, line: int, row: dict[str, Any]) -> Generation:
    completion, prompt, tokens = row["completion"], row.get("prompt"), row.get("tokens")
    if not isinstance(completion, str) or not isinstance(prompt, str | None):
        raise DataError(f"{path}, line {line}: 'completion' and 'prompt' must be texts.")
    if not isinstance(tokens, int | None):
        raise DataError(f"{path}, line {line}: 'tokens' is {tokens!r}, not a whole number.")
    return Generation(completion, prompt, tokens)


def judge(job: Job, generations: Sequence[Generation]) -> list[Sample]:
    judgements = job.task.judge(job.problems, [g.completion for g in generations], job.protocol)
    return [
        Sample(job.task.name, p.task_id, g.prompt, g.completion, g.tokens, j.extracted, j.verdict)
        for p, g, j in zip(job.problems, generations, judgements, strict=True)
    ]


def summarise(job: Job, samples: Sequence[Sample]) -> dict[str, Any]:
    """The task's entry in results.json: a function of problems and samples only.

    `tokens` and `prompt_hash` are null where the completions came without token counts or prompts.
    """
    n = len(samples)
    verdicts = Counter(sample.verdict for sample in samples)
    prompts = [sample.prompt for sample in samples]
    tokens = [sample.tokens for sample in samples]
    return {
        "score": verdicts[Verdict.CORRECT] / n,
        "n": n,
        "interval": list(wilson_interval(verdicts[Verdict.CORRECT], n)),
        "invalid_rate": verdicts[Verdict.INVALID] / n,
        "timeouts": verdicts[Verdict.TIMEOUT],
        "tokens": None if None in tokens else sum(count for count in tokens if count is not None),
        "protocol": job.protocol.name,
        "prompt_hash": None if None in prompts else fingerprint(prompts),
        "data_hash": fingerprint([[p.task_id, p.text, p.reference] for p in job.problems]),
    }
