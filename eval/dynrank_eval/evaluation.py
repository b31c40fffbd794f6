"""From problems to results. Generating and scoring meet only in `Generation`."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError, RecipeError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.protocols import Protocol, load_protocol
from dynrank_eval.statistics import pass_at_k, wilson_interval
from dynrank_eval.tasks import Problem, Task, Verdict, fingerprint, get_task


@dataclass(frozen=True)
class Job:
    """A task, how it is asked, and the problems to score.

    Attributes:
        contexts: solved examples before each problem, "" where the protocol has none; None for scoring only.
        known_ids: of all problems, those beyond the limit too.
        samples: completions per problem.
    """

    task: Task
    protocol: Protocol
    problems: list[Problem]
    contexts: list[str] | None
    known_ids: frozenset[str]
    samples: int

    def prompts(self, tokenizer: Any) -> list[str]:
        assert self.contexts is not None, "a job for scoring has no prompts"
        pairs = zip(self.contexts, self.problems, strict=True)
        return [context + self.protocol.render(problem.text, tokenizer) for context, problem in pairs]

    def data_hash(self) -> str:
        return fingerprint([[p.task_id, p.text, p.reference] for p in self.problems])


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
    sample: int
    prompt: str | None
    completion: str
    tokens: int | None
    extracted: str | None
    verdict: Verdict
    grades: Mapping[str, bool]


@dataclass(frozen=True)
class Choice:
    """What to evaluate: the options that all commands share."""

    tasks: Sequence[str]
    protocol: str | None
    data_dir: Path | None
    limit: int | None
    samples: int
    allow_network: bool


def prepare(choice: Choice, generating: bool, scoring: bool) -> list[Job]:
    """Loads the problems of each task and checks everything that can be checked before the work."""
    if choice.data_dir is not None and not choice.data_dir.is_dir():
        raise DataError(f"--data-dir {choice.data_dir}: there is no such folder.")
    repeated = [name for name, times in Counter(choice.tasks).items() if times > 1]
    if repeated:
        raise RecipeError(f"--task names {repeated[0]} twice; once is enough.")
    jobs = [_prepare_one(get_task(name), choice, generating) for name in choice.tasks]
    if scoring:
        for job in jobs:
            job.task.check_machine(choice.allow_network)
    return jobs


def _prepare_one(task: Task, choice: Choice, generating: bool) -> Job:
    protocol = load_protocol(choice.protocol or task.default_protocol, task.name)
    problems = task.load(choice.data_dir)
    if not problems:
        raise DataError(f"{task.name}: the data hold no problems.")
    ids = Counter(problem.task_id for problem in problems)
    repeated = [task_id for task_id, times in ids.items() if times > 1]
    if repeated:
        raise DataError(f"{task.name}: the data hold the task_id {repeated[0]!r} twice.")
    contexts = None
    if generating:
        contexts = [""] * len(problems)
        if protocol.fewshot is not None:
            contexts = protocol.fewshot.contexts(task.examples(choice.data_dir), len(problems))
        contexts = contexts[: choice.limit]
    return Job(task, protocol, problems[: choice.limit], contexts, frozenset(ids), choice.samples)


def read_generations(path: Path, jobs: Sequence[Job]) -> list[list[Generation]]:
    """The completions for each job: those of the first problem, of the second, and so on.

    Rows hold `task_id` and `completion`, where there are several tasks `task` too, and optionally `prompt`
    and `tokens`: a samples.jsonl is such a file. Rows of other tasks, and of problems beyond the limit, are
    left out.

    Raises:
        DataError: a malformed line, an unknown task_id, too many or too few completions of a problem.
    """
    by_name = {job.task.name: job for job in jobs}
    found: dict[tuple[str, str], list[Generation]] = defaultdict(list)
    for line, row in read_rows(path, ("task_id", "completion")):
        if "task" not in row and len(jobs) > 1:
            raise DataError(f"{path}, line {line} lacks the key 'task', which several tasks need.")
        name = str(row.get("task", jobs[0].task.name))
        job = by_name.get(name)
        if job is None:
            continue
        task_id = str(row["task_id"])
        if task_id not in job.known_ids:
            raise DataError(
                f"{path}, line {line}: {name} has no task_id {task_id!r} among its {len(job.known_ids)} problems; "
                "are the completions of another benchmark, or another version of it?"
            )
        if len(found[name, task_id]) == job.samples:
            raise DataError(
                f"{path}, line {line}: the task_id {task_id!r} was there {_times(job.samples)} before; "
                "give each one once, or say with --n how many completions each problem has."
            )
        found[name, task_id].append(_generation(path, line, row))
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


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _generation(path: Path, line: int, row: dict[str, Any]) -> Generation:
    completion, prompt, tokens = row["completion"], row.get("prompt"), row.get("tokens")
    if not isinstance(completion, str) or not isinstance(prompt, str | None):
        raise DataError(f"{path}, line {line}: 'completion' and 'prompt' must be texts.")
    if not isinstance(tokens, int | None):
        raise DataError(f"{path}, line {line}: 'tokens' is {tokens!r}, not a whole number.")
    return Generation(completion, prompt, tokens)


def judge(job: Job, generations: Sequence[Generation]) -> list[Sample]:
    """Judges the completions, `job.samples` of each problem one after another."""
    problems = [problem for problem in job.problems for _ in range(job.samples)]
    judgements = job.task.judge(problems, [g.completion for g in generations], job.protocol)
    return [
        Sample(
            task=job.task.name,
            task_id=problem.task_id,
            sample=place % job.samples,
            prompt=given.prompt,
            completion=given.completion,
            tokens=given.tokens,
            extracted=judgement.extracted,
            verdict=judgement.verdict,
            grades=judgement.grades,
        )
        for place, (problem, given, judgement) in enumerate(
            zip(problems, generations, judgements, strict=True)
        )
    ]


def summarise(job: Job, samples: Sequence[Sample], ks: Sequence[int]) -> dict[str, Any]:
    """The task's entry in results.json: a function of problems and samples only.

    `score` is the mean over all samples, which for several per problem is pass@1. The interval counts each problem
    as one observation, whatever its samples. `tokens` and `prompt_hash` are null where the completions came
    without token counts or prompts.
    """
    n, total = len(job.problems), len(samples)
    verdicts = Counter(sample.verdict for sample in samples)
    solved = Counter(sample.task_id for sample in samples if sample.verdict is Verdict.CORRECT)
    prompts = [sample.prompt for sample in samples]
    tokens = [sample.tokens for sample in samples]
    score = verdicts[Verdict.CORRECT] / total
    entry: dict[str, Any] = {
        "score": score,
        "n": n,
        "interval": list(wilson_interval(verdicts[Verdict.CORRECT] / job.samples, n)),
        "invalid_rate": verdicts[Verdict.INVALID] / total,
        "timeouts": verdicts[Verdict.TIMEOUT],
        "samples_per_problem": job.samples,
        "pass_at": {
            str(k): sum(pass_at_k(job.samples, solved[p.task_id], k) for p in job.problems) / n for k in ks
        },
        "tokens": None if None in tokens else sum(count for count in tokens if count is not None),
        "protocol": job.protocol.name,
        "prompt_hash": None if None in prompts else fingerprint(prompts[:: job.samples]),
        "data_hash": job.data_hash(),
    }
    names = sorted({name for sample in samples for name in sample.grades})
    if names:
        entry["grades"] = {name: sum(s.grades.get(name, False) for s in samples) / total for name in names}
    return entry
