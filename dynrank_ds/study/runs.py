"""One run of a study: trained, brought to its size, merged, scored; each part by the command that a user would give.

What is done is kept: a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dynrank_ds.bench.machine import machine
from dynrank_ds.errors import RunError
from dynrank_ds.export.inspection import Inspection, inspect_adapter
from dynrank_ds.files import read_json
from dynrank_ds.recipe import Recipe
from dynrank_ds.report.places import kinds_of, place
from dynrank_ds.study.definition import Run, Split, Study, recipe_of
from dynrank_ds.study.records import Facts, Record, TaskScore, read_record, settings, write_record


class StoppedError(Exception):
    """A signal came; everything done so far is kept."""


class FailedError(RunError):
    """A command of a run failed; other runs of the study are not concerned."""


@dataclass
class Commands:
    """Runs commands one after the other and ends them when a signal comes.

    launcher: folder of train.py and stop_training.py.
    """

    launcher: Path
    is_stopped: bool = False
    _running: subprocess.Popen[bytes] | None = None
    _training: str | None = field(default=None)

    def run(self, words: Sequence[str], log: Path, lock: IO[str], training: Path | None = None) -> None:
        """Run a command with its output in `log`.

        Args:
            lock: held by the command too, so that a run whose worker was killed stays taken until all of it has ended.
            training: the run directory, of a command that trains: it is asked to save when a signal comes.

        Raises:
            StoppedError: a signal came.
            FailedError: the command failed, with the last line of its output.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._training = f"output.dir={training}" if training else None
        with log.open("ab") as output:
            if self.is_stopped:
                raise StoppedError
            # In a session of its own, so that Ctrl-C reaches the worker alone.
            self._running = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            code = self._running.wait()
        self._running = None
        if self.is_stopped:
            raise StoppedError
        if code:
            raise FailedError(f"`{' '.join(words[:4])} ...` failed with {code}; its output is in {log}")

    def stop(self, *_: object) -> None:
        """End the command that runs, training with a checkpoint; for signal handlers."""
        self.is_stopped = True
        if self._running is None:
            return
        if self._training:
            subprocess.Popen([sys.executable, str(self.launcher / "stop_training.py"), self._training])
        else:
            os.killpg(self._running.pid, signal.SIGTERM)


@dataclass(frozen=True)
class RunWork:
    """One run of a study, whose lock this worker holds."""

    study: Study
    run: Run
    commands: Commands
    lock: IO[str]

    @property
    def folder(self) -> Path:
        """Of everything but the record."""
        return Path(self.study.output) / self.run.name

    def do(self, split: Split) -> None:
        """Train the run if it has not been, and score it on the problems of `split`.

        Raises:
            StoppedError: a signal came.
            FailedError: a command failed.
        """
        record = read_record(self.study, self.run)
        if record is None:
            record = Record(**settings(self.study, self.run), facts=self._train())
            write_record(self.study, self.run, record)
        if not record.is_done(split):
            scores = {**record.scores, split: self._score(split)}
            write_record(self.study, self.run, record.model_copy(update={"scores": scores}))

    def _train(self) -> Facts:
        directory = self.folder / "run"
        recipe, words = recipe_of(self.study, self.run, directory)
        name = self.study.arms[self.run.point.arm].recipe
        script = str(self.commands.launcher / "train.py")
        # As many processes as the study says, on a free port.
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.study.processes}"]
        if not (directory / "adapter").is_dir():
            try:
                self._run(
                    "train", *launch, script, "--recipe", name, *words, "resume=auto", training=directory
                )
            except FailedError:
                if (reason := _divergence(directory)) is None:
                    raise
                return self._facts(recipe, None, reason)
        resize = self.study.arms[self.run.point.arm].resize
        if resize and not (self.folder / "resized").is_dir():
            where = ["--adapter", str(directory / "adapter"), "--output", str(self.folder / "resized")]
            self._dynrank("resize", *where, *resize.options())
        return self._facts(recipe, inspect_adapter(self._adapter()), None)

    def _adapter(self) -> Path:
        resized = self.study.arms[self.run.point.arm].resize is not None
        return self.folder / ("resized" if resized else "run/adapter")

    def _score(self, split: Split) -> dict[str, TaskScore]:
        part, merged, output = self.study.split(split), self.folder / "merged", self.folder / f"eval-{split}"
        if not (output / "results.json").is_file():
            shutil.rmtree(merged, ignore_errors=True)
            self._dynrank("merge", "--adapter", str(self._adapter()), "--output", str(merged))
            words = ["--model", str(merged), "--task", ",".join(part.tasks), "--skip", str(part.skip)]
            words += ["--limit", str(part.limit)] if part.limit else []
            words += ["--data-dir", part.data_dir] if part.data_dir else []
            evaluator = ("-m", "dynrank_eval.cli", "run")
            self._run(f"eval-{split}", *evaluator, *words, *self.study.scoring, "--output", str(output))
            shutil.rmtree(merged)
        return read_scores(output)

    def _dynrank(self, verb: str, *words: str) -> None:
        self._run(verb, "-m", "dynrank_ds.cli", verb, *words)

    def _run(self, name: str, *words: str, training: Path | None = None) -> None:
        log = self.folder / "logs" / f"{name}.log"
        self.commands.run([sys.executable, *words], log, self.lock, training)

    def _facts(self, recipe: Recipe, adapter: Inspection | None, diverged: str | None) -> Facts:
        directory = self.folder / "run"
        steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        environment = read_json(directory / "environment.json")
        last = [one["loss"] for one in steps[-max(1, len(steps) // 10) :] if one["loss"] is not None]
        return Facts(
            recipe_sha256=_recipe_hash(recipe),
            identity=environment.pop("identity"),
            environment={key: value for key, value in environment.items() if key != "command"},
            machine=machine(),
            steps=int(steps[-1]["step"]),
            seconds=round(sum(one["seconds"] for one in steps), 1),
            peak_parameters=max(one["trainable_parameters"] for one in steps),
            parameters=adapter.parameters if adapter else 0,
            ranks=_ranks_by_kind(adapter) if adapter else {},
            loss=None if diverged else sum(last) / len(last),
            diverged=diverged,
        )


def read_scores(output: Path) -> dict[str, TaskScore]:
    """Return the verdicts of a finished evaluation."""
    results = read_json(output / "results.json")["tasks"]
    correct: dict[str, dict[str, list[bool]]] = {name: {} for name in results}
    for line in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        correct[sample["task"]].setdefault(sample["task_id"], []).append(sample["verdict"] == "correct")
    return {
        name: TaskScore(
            protocol=entry["protocol"],
            data_hash=entry["data_hash"],
            shares=[round(sum(each) / len(each), 6) for each in correct[name].values()],
        )
        for name, entry in results.items()
    }


def _divergence(directory: Path) -> str | None:
    """Return why training gave up, where the last batches' loss was not finite; else None."""
    state = directory / "state.json"
    lines = directory / "metrics.jsonl"
    if not state.is_file() or not lines.is_file():
        return None
    last: dict[str, Any] = json.loads(lines.read_text().splitlines()[-1])
    error = read_json(state)["error"]
    return str(error) if error and last["loss"] is None else None


def _recipe_hash(recipe: Recipe) -> str:
    values = recipe.model_dump(mode="json", exclude={"output"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _ranks_by_kind(adapter: Inspection) -> dict[str, list[int]]:
    ranks = {one.name: one.rank for one in adapter.modules}
    names = sorted(ranks, key=lambda name: place(name).layer)
    return {kind: [ranks[n] for n in names if place(n).kind == kind] for kind in kinds_of(ranks)}
