"""From completions to verdicts, and from verdicts to a task's entry in results.json."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynrank_eval.completions import GivenCompletion
from dynrank_eval.jobs import Job
from dynrank_eval.statistics import pass_at_k, shares_interval
from dynrank_eval.tasks import Verdict, fingerprint


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl."""

    task: str
    task_id: str
    sample: int
    prompt: str | None
    completion: str
    tokens: int | None
    max_new_tokens: int | None
    truncated: bool | None
    extracted: str | None
    verdict: Verdict
    grades: Mapping[str, bool]
    grader: str


def judge(job: Job, given: Sequence[GivenCompletion]) -> list[Sample]:
    """Judge the completions, `job.samples` of each problem one after another."""
    problems = [problem for problem in job.problems for _ in range(job.samples)]
    judgements = job.task.judge(problems, [completion.text for completion in given], job.protocol)
    return [
        Sample(
            task=job.task.name,
            task_id=problem.task_id,
            sample=place % job.samples,
            prompt=completion.prompt,
            completion=str(completion.text),
            tokens=completion.tokens,
            max_new_tokens=completion.max_new_tokens,
            truncated=completion.truncated,
            extracted=judgement.extracted,
            verdict=judgement.verdict,
            grades=judgement.grades,
            grader=judgement.grader,
        )
        for place, (problem, completion, judgement) in enumerate(
            zip(problems, given, judgements, strict=True)
        )
    ]


def summarize(job: Job, samples: Sequence[Sample], ks: Sequence[int]) -> dict[str, Any]:
    """Return the task's entry in results.json: a function of problems and samples only.

    `score` is the mean over all samples, which for several per problem is pass@1. Token counts, truncation and prompt
    hash are null where the completions came without them.
    """
    n, total = len(job.problems), len(samples)
    verdicts = Counter(sample.verdict for sample in samples)
    prompts = [sample.prompt for sample in samples]
    tokens = [sample.tokens for sample in samples]
    truncated = [sample.truncated for sample in samples]
    limits = {sample.max_new_tokens for sample in samples}
    score = verdicts[Verdict.CORRECT] / total
    shares = _pass_at_of_each(job, samples, 1)
    entry: dict[str, Any] = {
        "score": score,
        "n": n,
        "interval": list(shares_interval(shares, job.samples)),
        "invalid_rate": verdicts[Verdict.INVALID] / total,
        "timeouts": verdicts[Verdict.TIMEOUT],
        "samples_per_problem": job.samples,
        **_pass_at(job, samples, ks),
        "tokens": None if None in tokens else sum(count for count in tokens if count is not None),
        "truncated_rate": None if None in truncated else sum(map(bool, truncated)) / total,
        "protocol": job.protocol.name,
        "shots": job.protocol.fewshot.n if job.protocol.fewshot else 0,
        "stop": list(job.protocol.stop),
        "max_new_tokens": limits.pop() if len(limits) == 1 else None,
        "prompt_hash": None if None in prompts else fingerprint(prompts[:: job.samples]),
        "data": job.data,
        "data_hash": job.data_hash(),
        "decided_by": dict(sorted(Counter(sample.grader for sample in samples if sample.grader).items())),
    }
    names = sorted({name for sample in samples for name in sample.grades})
    if names:
        entry["grades"] = {name: sum(s.grades.get(name, False) for s in samples) / total for name in names}
    if groups := _groups(job, samples):
        entry["groups"] = groups
    return entry


def _pass_at(job: Job, samples: Sequence[Sample], ks: Sequence[int]) -> dict[str, Any]:
    """Return pass@k and its interval."""
    estimates = {str(k): _pass_at_of_each(job, samples, k) for k in ks}
    return {
        "pass_at": {k: sum(each) / len(each) for k, each in estimates.items()},
        "pass_at_interval": {k: list(shares_interval(each, job.samples)) for k, each in estimates.items()},
    }


def _pass_at_of_each(job: Job, samples: Sequence[Sample], k: int) -> list[float]:
    """Return pass@k of each problem."""
    solved = Counter(sample.task_id for sample in samples if sample.verdict is Verdict.CORRECT)
    return [pass_at_k(job.samples, solved[problem.task_id], k) for problem in job.problems]


def _groups(job: Job, samples: Sequence[Sample]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return score, n and interval by each of the problems' groups (subject, level)."""
    right: Counter[str] = Counter(s.task_id for s in samples if s.verdict is Verdict.CORRECT)
    found: dict[str, dict[str, list[float]]] = {}
    for problem in job.problems:
        for group, value in problem.groups.items():
            found.setdefault(group, {}).setdefault(value, []).append(right[problem.task_id] / job.samples)
    return {
        group: {
            value: {
                "score": sum(each) / len(each),
                "n": len(each),
                "interval": list(shares_interval(each, job.samples)),
            }
            for value, each in sorted(values.items())
        }
        for group, values in sorted(found.items())
    }
