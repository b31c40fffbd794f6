"""Who does what: workers take the runs of a study one by one, each the next that no other works on.

Workers are processes that see the same folders, on one machine or as jobs of a batch system. They hold a lock on the
run that they work on, which ends with them however they end, and share nothing else.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dynrank_ds.errors import DataError
from dynrank_ds.study.definition import FINAL, TUNING, Run, Split, Study, tuning_runs
from dynrank_ds.study.records import best_point, read_record, tuned_scores
from dynrank_ds.study.runs import Commands, FailedError, RunWork

_POLL_SECONDS = 5.0

logger = logging.getLogger(__name__)


def open_work(study: Study) -> Iterator[tuple[Run, Split]]:
    """Yield what can be done now, in the order in which it should be: arm by arm, each tuned before its final runs."""
    for arm in study.arms:
        scored = tuned_scores(study, arm)
        if scored is None:
            candidates: list[tuple[Run, Split]] = [(run, TUNING) for run in tuning_runs(study, arm)]
        else:
            candidates = [(Run(best_point(scored), seed), FINAL) for seed in study.final.seeds]
        for run, split in candidates:
            record = read_record(study, run)
            if record is None or not record.is_done(split):
                yield run, split


def work_until_done(study: Study, commands: Commands) -> list[str]:
    """Do what is open until nothing is, and return what failed, one sentence a run.

    Waits where others work on all that is left, since final runs may follow from theirs.

    Raises:
        StoppedError: a signal came.
    """
    failures: dict[str, str] = {}
    while open_now := [(run, split) for run, split in open_work(study) if run.name not in failures]:
        for run, split in open_now:
            with _claimed(study, run) as lock:
                if lock is None:
                    continue
                logger.info("%s: %s", run.name, split)
                started = time.monotonic()
                try:
                    RunWork(study, run, commands, lock).do(split)
                except FailedError as error:
                    failures[run.name] = f"{run.name}: {error}"
                    logger.error("%s", failures[run.name])
                else:
                    logger.info("%s: %s done in %.0f s", run.name, split, time.monotonic() - started)
            break  # what is open may have changed meanwhile
        else:
            time.sleep(_POLL_SECONDS)
    return list(failures.values())


@contextmanager
def _claimed(study: Study, run: Run) -> Iterator[IO[str] | None]:
    """Hold the lock of a run; None where another worker has it."""
    folder = Path(study.output) / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{run.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def check_problems(study: Study) -> tuple[int, int]:
    """Return how many problems tune and how many decide, after making sure that none does both.

    Raises:
        DataError: a problem is in both, or they cannot be read.
    """
    from dynrank_eval import Selection
    from dynrank_eval.jobs import prepare

    prompts = []
    for name in (TUNING, FINAL):
        part = study.split(name)
        data = Path(part.data_dir) if part.data_dir else None
        selection = Selection(part.tasks, data_dir=data, limit=part.limit, skip=part.skip)
        jobs = prepare(selection, generating=False, scoring=False)
        prompts.append({problem.text for job in jobs for problem in job.problems})
    shared = prompts[0] & prompts[1]
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(prompts[0])} tuning problems are final problems too, such as "
            f"{sorted(shared)[0][:60]!r}: give tuning and final problems that share none, by skip, limit or data_dir"
        )
    return len(prompts[0]), len(prompts[1])
