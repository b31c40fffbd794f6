"""SIGTERM and SIGUSR1 under the launchers, as they are: what README says of them.

Processes without a launcher are tested in test_resume.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dynrank_ds.checkpoint.files import check, complete_checkpoints
from tests.support.launch import ROOT, notes_signals
from tests.support.recipes import lines, write_recipe

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
RESTARTING_TORCHRUN = (*TORCHRUN, "--max_restarts", "3")
DEEPSPEED = ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2")


def has_made_two_steps(folder: Path, launcher: psutil.Process) -> bool:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.is_file() and len(lines(metrics)) >= 2


def has_begun_to_import(folder: Path, launcher: psutil.Process) -> bool:
    found = training_processes(launcher)
    return len(found) == 2 and all(notes_signals(p.pid) for p in found)


@contextmanager
def running(
    folder: Path,
    launcher: tuple[str, ...],
    ready: Callable[[Path, psutil.Process], bool] = has_made_two_steps,
) -> Iterator[psutil.Process]:
    """The launcher of a run, once it is ready; nothing of it is left afterwards."""
    recipe = write_recipe(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = ("--master_port", str(probe.getsockname()[1]))
    script = (
        str(ROOT / "launcher/train.py"),
        "--recipe",
        str(recipe),
        "train.steps=10000",
        "method.interval=1000",
    )
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        process = psutil.Popen(
            [sys.executable, *launcher, *port, *script], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    family: list[psutil.Process] = []
    try:
        while not ready(folder, process):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        family = process.children(recursive=True)
        yield process
    finally:
        for member in [process, *family]:
            if member.is_running():
                member.kill()


WORKERS = "-u [^ ]*launcher/train.py"
"""What README gives to pkill: it is to find the training processes and no launcher."""


def training_processes(launcher: psutil.Process) -> list[psutil.Process]:
    family = [launcher, *launcher.children(recursive=True)]
    return [p for p in family if re.search(WORKERS, " ".join(p.cmdline()))]


def workers(launcher: psutil.Process) -> list[psutil.Process]:
    found = training_processes(launcher)
    assert len(found) == 2 and WORKERS in (ROOT / "dynrank_ds/training/README.md").read_text()
    return found


def the_launch_of_a_node(launcher: psutil.Process) -> psutil.Process:
    return next(p for p in launcher.children(recursive=True) if "deepspeed.launcher.launch" in p.cmdline())


def saved(folder: Path) -> bool:
    """Whether the run stopped after a step that it saved."""
    found = complete_checkpoints(folder / "run")
    for checkpoint in found:
        check(checkpoint)
    last = lines(folder / "run" / "metrics.jsonl")[-1]["step"]
    state = json.loads((folder / "run" / "state.json").read_text())
    return (
        [path.name for path in found] == [f"step-{last}"]
        and (state["state"], state["step"]) == ("stopped", last)
        and (folder / "log").read_text().count("resume=auto") == 1
    )


@pytest.mark.parametrize(
    ("launcher", "number", "receiver", "code"),
    [
        (TORCHRUN, signal.SIGUSR1, lambda p: workers(p)[1], 1),
        (RESTARTING_TORCHRUN, signal.SIGUSR1, lambda p: workers(p)[1], 0),
        (TORCHRUN, signal.SIGTERM, lambda p: p, 1),
        (DEEPSPEED, signal.SIGUSR1, lambda p: workers(p)[1], 75),
        (DEEPSPEED, signal.SIGTERM, the_launch_of_a_node, 1),
    ],
    ids=[
        "torchrun, a worker",
        "torchrun that restarts, a worker",
        "torchrun itself",
        "deepspeed, a worker",
        "deepspeed, its launch process",
    ],
)
def test_the_run_is_saved_and_ends(
    launcher: tuple[str, ...],
    number: signal.Signals,
    receiver: Callable[[psutil.Process], psutil.Process],
    code: int,
    tmp_path: Path,
) -> None:
    with running(tmp_path, launcher) as process:
        receiver(process).send_signal(number)
        assert process.wait(60) == code, (tmp_path / "log").read_text()[-3000:]
        assert saved(tmp_path)


@pytest.mark.parametrize(
    ("launcher", "code"),
    [(TORCHRUN, 1), (RESTARTING_TORCHRUN, 0), (DEEPSPEED, 75)],
    ids=["torchrun", "torchrun that restarts", "deepspeed"],
)
def test_state_json_tells_a_stop_before_training_whatever_the_launchers_exit_code_is(
    launcher: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    with running(tmp_path, launcher, has_begun_to_import) as process:
        workers(process)[1].send_signal(signal.SIGTERM)
        assert process.wait(120) == code, (tmp_path / "log").read_text()[-3000:]
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert (state["state"], state["step"], state["error"]) == ("stopped", 0, None)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("launcher", "number"),
    [(TORCHRUN, signal.SIGUSR1), (DEEPSPEED, signal.SIGUSR1), (DEEPSPEED, signal.SIGTERM)],
    ids=["torchrun USR1", "deepspeed USR1", "deepspeed TERM"],
)
def test_a_launcher_that_dies_of_a_signal_leaves_its_processes_training(
    launcher: tuple[str, ...], number: signal.Signals, tmp_path: Path
) -> None:
    with running(tmp_path, launcher) as process:
        left = workers(process)
        process.send_signal(number)
        process.wait(60)
        logged = len(lines(tmp_path / "run" / "metrics.jsonl"))
        time.sleep(3)
        assert all(worker.is_running() for worker in left)
        assert len(lines(tmp_path / "run" / "metrics.jsonl")) > logged
