"""Workers: the order of runs, locks, failures, stops; and a whole study of seconds that is killed on the way."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynrank_ds.errors import RunError
from dynrank_ds.study import work
from dynrank_ds.study.definition import Run, Split, Study, load_study, points
from dynrank_ds.study.records import read_record
from dynrank_ds.study.runs import Commands, FailedError, RunWork, StoppedError
from dynrank_ds.study.work import open_work, work_until_done
from tests.support.launch import launcher_script
from tests.support.studies import add_scores, write_study

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(write_study(tmp_path))


class Worker:
    """Stands for training and scoring: the higher learning rate of LoRA solves more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, Split]] = []
        self.failing: set[str] = set()
        monkeypatch.setattr(RunWork, "do", lambda one, split: self.do(one, split))
        monkeypatch.setattr(work, "_POLL_SECONDS", 0.01)

    def do(self, one: RunWork, split: Split) -> None:
        self.done.append((one.run.name, split))
        if one.run.name in self.failing:
            raise FailedError("`python train.py` failed with 1")
        solved = 1.0 if "0.01" in one.run.name else 0.0
        add_scores(one.study, one.run, split, [solved] * (3 if split == "tuning" else 5))


def test_arms_are_tuned_and_their_best_point_is_run_with_every_final_seed(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(monkeypatch)
    assert work_until_done(study, Commands(ROOT / "launcher")) == []
    assert worker.done == [
        ("lora-learning_rate=0.001-seed1", "tuning"),
        ("lora-learning_rate=0.01-seed1", "tuning"),
        ("lora-learning_rate=0.01-seed1", "final"),
        ("lora-learning_rate=0.01-seed2", "final"),
        ("pe_dyra-learning_rate=0.001-seed1", "tuning"),
        ("pe_dyra-learning_rate=0.001-seed1", "final"),
        ("pe_dyra-learning_rate=0.001-seed2", "final"),
    ]
    worker.done.clear()
    assert work_until_done(study, Commands(ROOT / "launcher")) == [] and worker.done == []


def test_a_run_that_another_worker_holds_is_left_to_it(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch)
    held = Run(points(study, "lora")[0], 1)
    locks = Path(study.output) / "locks"
    locks.mkdir(parents=True)
    polls = []
    with (locks / f"{held.name}.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def other_finishes(seconds: float) -> None:
            polls.append(seconds)
            add_scores(study, held, "tuning", [0.0] * 3)

        monkeypatch.setattr("time.sleep", other_finishes)
        assert work_until_done(study, Commands(ROOT / "launcher")) == []
    assert (held.name, "tuning") not in worker.done and len(polls) == 1
    # What needs nothing of the other's is done first, then what follows from it.
    assert worker.done[0] == ("lora-learning_rate=0.01-seed1", "tuning")
    assert ("lora-learning_rate=0.01-seed2", "final") in worker.done


def test_a_failed_run_is_told_once_and_the_others_go_on(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(monkeypatch)
    worker.failing.add("lora-learning_rate=0.001-seed1")
    failures = work_until_done(study, Commands(ROOT / "launcher"))
    assert failures == ["lora-learning_rate=0.001-seed1: `python train.py` failed with 1"]
    names = [name for name, _ in worker.done]
    assert names.count("lora-learning_rate=0.001-seed1") == 1
    assert "pe_dyra-learning_rate=0.001-seed2" in names
    assert not any(name.startswith("lora") and split == "final" for name, split in worker.done)


def test_a_run_that_diverged_counts_as_tuned_with_score_0(study: Study) -> None:
    low, high = (Run(point, 1) for point in points(study, "lora"))
    add_scores(study, low, "tuning", [1, 0, 0])
    add_scores(study, high, "tuning", [], diverged="8 steps in a row were discarded")
    assert [(run.name, split) for run, split in open_work(study)][:2] == [
        ("lora-learning_rate=0.001-seed1", "final"),
        ("lora-learning_rate=0.001-seed2", "final"),
    ]


def test_a_record_of_other_settings_is_refused(study: Study, tmp_path: Path) -> None:
    run = Run(points(study, "lora")[0], 1)
    add_scores(study, run, "tuning", [1, 0, 0])
    changed = study.model_copy(update={"overrides": {"train.steps": 9}})
    with pytest.raises(
        RunError, match=r"made with overrides .*\"train.steps\": 8.*the study says .*\"train.steps\": 9"
    ):
        list(open_work(changed))
    record = tmp_path / "results" / f"{run.name}.json"
    record.write_text(record.read_text().replace('"steps": 8,', '"steps": "many",'))
    with pytest.raises(RunError, match=r"is no record of a study \(facts.steps"):
        list(open_work(study))


def test_a_signal_ends_the_command_that_runs_and_nothing_is_begun_after_it(tmp_path: Path) -> None:
    commands = Commands(ROOT / "launcher")
    sleeping = [
        sys.executable,
        "-c",
        "import os, signal, time; os.kill(os.getppid(), signal.SIGUSR2); time.sleep(600)",
    ]
    before = signal.signal(signal.SIGUSR2, commands.stop)
    try:
        with (tmp_path / "lock").open("a") as lock, pytest.raises(StoppedError):
            commands.run(sleeping, tmp_path / "log", lock)
        with (tmp_path / "lock").open("a") as lock, pytest.raises(StoppedError):
            commands.run(
                [sys.executable, "-c", f"open({str(tmp_path / 'begun')!r}, 'w')"], tmp_path / "log", lock
            )
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not (tmp_path / "begun").exists()


def test_a_command_that_fails_is_named_with_its_output(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with (
        (tmp_path / "lock").open("a") as lock,
        pytest.raises(FailedError, match=f"failed with 1; its output is in {tmp_path}"),
    ):
        Commands(ROOT / "launcher").run(failing, tmp_path / "log", lock)
    assert "no such thing" in (tmp_path / "log").read_text()


def test_the_command_line_plans_reports_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = launcher_script("sweep.py")
    path = write_study(tmp_path)
    assert sweep.main(["plan", str(path)]) == 0
    planned = capsys.readouterr().out
    assert "open now: 3" in planned and "finds a difference of" in planned
    assert sweep.main(["report", str(path)]) == 0
    assert "nothing can be said" in (tmp_path / "results/report.md").read_text()
    assert sweep.main([str(tmp_path / "absent.yaml")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/absent.yaml cannot be read: No such file or directory\n"
    )
    assert not (tmp_path / "runs").exists()


def test_workers_share_out_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, path = launcher_script("sweep.py"), write_study(tmp_path)
    started: list[str | None] = []
    codes = iter([0, 75, 0, 75, -9])

    class Worker:
        def __init__(self, command: list[str], env: dict[str, str], start_new_session: bool) -> None:
            started.append(env.get("CUDA_VISIBLE_DEVICES"))

        def wait(self) -> int:
            return next(codes)

    monkeypatch.setattr(sweep.subprocess, "Popen", Worker)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.main([str(path), "--workers", "2"]) == 75
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert sweep.main([str(path), "--workers", "3"]) == 1
    assert started == ["0,1,2,3", "4,5,6,7", "3", "5", "6"]
    assert sweep.main([str(path), "--workers", "4"]) == 2
    assert "--workers is 4, and this machine has 3 GPUs" in capsys.readouterr().err


@pytest.mark.soak
def test_a_study_that_was_killed_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    found = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        path = write_study(folder, processes=2)
        command = [sys.executable, str(ROOT / "launcher/sweep.py"), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if name == "killed":
            for number, (signal_sent, code) in enumerate(((signal.SIGTERM, 75), (signal.SIGKILL, -9))):
                worker = subprocess.Popen(command, env=environment, cwd=ROOT)
                run = (
                    folder
                    / "runs"
                    / ("lora-learning_rate=0.001-seed1", "lora-learning_rate=0.01-seed1")[number]
                )
                _wait_for(run / "run" / "metrics.jsonl", worker)
                worker.send_signal(signal_sent)
                assert worker.wait(300) == code
        assert subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode == 0
        study = load_study(path)
        records = [
            read_record(study, Run(point, seed))
            for arm in study.arms
            for point in points(study, arm)
            for seed in (1, 2)
        ]
        found.append(
            [(one.facts.loss, one.facts.ranks, one.facts.parameters, one.scores) for one in records if one]
        )
        resized = json.loads((folder / "results/pe_dyra-learning_rate=0.001-seed1.json").read_text())
        assert resized["facts"]["parameters"] <= 4000 < resized["facts"]["peak_parameters"]
    assert found[0] == found[1] and len(found[0]) == 5


def _wait_for(path: Path, worker: subprocess.Popen[bytes]) -> None:
    import time

    while not path.is_file():
        assert worker.poll() is None
        time.sleep(0.05)
