"""The library's entry: generate and score, or score completions that exist, as the command line does."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RecipeError, RunError
from dynrank_eval import identity, output
from dynrank_eval.completions import read_completions
from dynrank_eval.engines import Engine
from dynrank_eval.generation import GenerationSettings, generate, resolve_dtype
from dynrank_eval.jobs import Job, Selection, prepare
from dynrank_eval.scoring import Sample, judge, summarize


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
        tasks: each task's entry in results.json.
        run: time, command, model, machine and versions.
        samples: every completion with its verdict.
        output: the folder with results.json and samples.jsonl; None where nothing was written.
    """

    tasks: Mapping[str, dict[str, Any]]
    run: Mapping[str, Any]
    samples: Sequence[Sample]
    output: Path | None

    def score(self, task: str) -> float:
        """Return a task's score, from 0 to 1."""
        return float(self.tasks[task]["score"])


def evaluate(
    selection: Selection,
    *,
    generating: GenerationSettings | None = None,
    completions: Path | None = None,
    output_dir: Path | None = None,
    ks: Sequence[int] = (1,),
    engine: Engine | None = None,
    command: str | None = None,
) -> Results:
    """Score a model, or completions that were generated elsewhere.

    Args:
        selection: tasks, protocol, data and number of completions.
        generating: the model and how it is asked; or
        completions: a JSONL file of `task_id` and `completion`.
        output_dir: folder for results.json and samples.jsonl; needed for generating, which resumes from it.
        ks: pass@k for these k.
        command: what the run block names as the command; None: this process's command line.
        engine: one that is started already, with the model of `generating`; None: one is started.

    Returns:
        The results, which are in `output_dir` as well.

    Raises:
        DynrankError: a mistake in what was asked for; nothing is written then.
    """
    if (generating is None) == (completions is None):
        raise RecipeError("give either `generating` or `completions`: one of them says what is scored.")
    jobs = check(selection, generating, output_dir, ks)
    if output_dir is not None:
        if completions is not None:
            _check_not_over_completions(completions, output_dir)
        output.check_same_evaluation(output_dir, jobs, completions)
    start = time.monotonic()
    details: dict[str, Any]
    if generating is not None:
        assert output_dir is not None
        generating = replace(generating, dtype=resolve_dtype(generating.dtype))
        _generate(generating, jobs, output_dir, engine)
        details = {
            **describe(generating, jobs),
            "generation_seconds": round(time.monotonic() - start, 3),
        }
        source = output_dir / output.SAMPLES
    else:
        assert completions is not None
        details = {"generations": str(completions), "generations_sha256": output.sha256(completions)}
        source = completions
    given = read_completions(source, jobs)
    start = time.monotonic()
    judged = [judge(job, each) for job, each in zip(jobs, given, strict=True)]
    tasks = {job.task.name: summarize(job, done, ks) for job, done in zip(jobs, judged, strict=True)}
    run = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **details,
        "scoring_seconds": round(time.monotonic() - start, 3),
        **{name: fact for job in jobs for name, fact in job.task.machine().items()},
        "versions": identity.versions(),
    }
    samples = [sample for done in judged for sample in done]
    if output_dir is not None:
        output.write_output(output_dir, samples, tasks, run)
    return Results(tasks, run, samples, output_dir)


def generate_only(selection: Selection, generating: GenerationSettings, output_dir: Path) -> int:
    """Generate the completions into `output_dir`, resuming where an earlier call stopped; return how many there are."""
    jobs = check(selection, generating, output_dir, (), scoring=False)
    _generate(generating, jobs, output_dir, None)
    return sum(len(job.problems) * job.samples for job in jobs)


def check(
    selection: Selection,
    generating: GenerationSettings | None,
    output_dir: Path | None,
    ks: Sequence[int],
    scoring: bool = True,
) -> list[Job]:
    """Return the jobs, after everything that can be checked before any work."""
    if output_dir is not None:
        output.check_output(output_dir)
    elif generating is not None:
        raise RecipeError("`output_dir` is needed for generating: completions are written as they come.")
    jobs = prepare(selection, generating=generating is not None, scoring=scoring)
    for job in jobs:
        for k in ks:
            if k > job.samples:
                raise RecipeError(
                    f"--k {k} needs at least {k} completions per problem, --n is {job.samples}."
                )
        if generating is not None and job.samples > 1 and generating.sampling(job)[0] == 0:
            raise RecipeError(
                f"--n {job.samples} at --temperature 0 makes the same completion {job.samples} times; "
                "set one above 0."
            )
    return jobs


def describe(generating: GenerationSettings, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what the run block says of the model and how it was asked."""
    return {
        "model": identity.describe_model(generating.model),
        "adapter": None if generating.adapter is None else identity.describe_adapter(generating.adapter),
        "engine": generating.engine,
        "engines": generating.engines,
        "dtype": generating.dtype,
        "max_new_tokens": {job.task.name: generating.budget(job) for job in jobs},
        "sampling": {
            job.task.name: dict(zip(("temperature", "top_p"), generating.sampling(job), strict=True))
            for job in jobs
        },
        "seed": generating.seed,
        "batch_invariant": generating.batch_invariant,
        "device": identity.describe_device(),
    }


def _generate(settings: GenerationSettings, jobs: Sequence[Job], folder: Path, engine: Engine | None) -> None:
    if engine is None:
        generate(settings, jobs, folder)
    else:
        generate(settings, jobs, folder, start=lambda chosen, spec: engine)


def _check_not_over_completions(completions: Path, output_dir: Path) -> None:
    """Raise RunError where scores would replace completions that a model generated."""
    itself = completions.absolute() == (output_dir / output.SAMPLES).absolute()
    if itself or (output_dir / output.SETTINGS).is_file():
        raise RunError(
            f"--output {output_dir} holds completions of a model; name another folder for the scores."
        )
