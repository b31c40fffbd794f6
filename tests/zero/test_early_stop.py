"""A signal to any process before training begins ends all of them, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrank_ds.training.rundir import RunDirectory
from dynrank_ds.training.signals import SIGNALS, StopRequest, exit_code_when_stopped, note_signals
from dynrank_ds.training.state import RunState
from tests.support.launch import notes_signals, start_processes, train, train_command, wait, wait_until
from tests.support.recipes import write_recipe


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_before_training_ends_both_soon(victim: int, tmp_path: Path) -> None:
    processes = start_processes(2, train_command(write_recipe(tmp_path)), tmp_path / "logs")
    # The other one has not even come to the rendezvous.
    os.kill(processes[1 - victim].pid, signal.SIGSTOP)
    wait_until(lambda: notes_signals(processes[victim].pid), processes)
    os.kill(processes[victim].pid, signal.SIGUSR1)
    os.kill(processes[1 - victim].pid, signal.SIGCONT)
    wait(processes, timeout=180)
    outputs = [process.output for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    assert [output.count("stopped by a signal before training began") for output in outputs] == [1, 0]
    # On a fast machine the run's files are there before the stop is seen: `resume=auto` begins with them.
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert written <= {".run.lock", "recipe.resolved.yaml", "environment.json", "checkpoints", "state.json"}
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert (state["state"], state["step"]) == ("stopped", 0)
    assert state["how_to_continue"] == "resume with the same command and resume=auto"
    train(2, tmp_path / "recipe.yaml", "resume=auto")
    assert json.loads((tmp_path / "run/state.json").read_text())["state"] == "finished"


def test_an_early_stop_leaves_the_state_of_another_run_in_the_directory_alone(tmp_path: Path) -> None:
    other, stopped = RunDirectory(tmp_path), RunState(tmp_path)
    assert other.lock()
    (tmp_path / "state.json").write_text("the other run's")
    stopped.write_early_stop()
    assert (tmp_path / "state.json").read_text() == "the other run's"
    other.unlock()
    stopped = RunState(tmp_path)
    (tmp_path / "checkpoints/step-12").mkdir(parents=True)
    (tmp_path / "state.json").write_text(json.dumps({"state": "running", "total_steps": 20}))
    stopped.write_early_stop()
    stopped.write("running", "the main thread had not noticed")
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["state"], state["step"], state["total_steps"]) == ("stopped", 12, 20)


def test_an_early_stop_stays_written_while_the_main_thread_fails(tmp_path: Path) -> None:
    # Since the others have ended, the main thread fails in a collective and lets go of the run's directory, which is
    # removed where the run ended before its first step.
    state = RunState(tmp_path / "run")
    assert state.directory.lock()
    state.write_early_stop()
    state.unlock()
    assert json.loads((tmp_path / "run/state.json").read_text())["state"] == "stopped"


def test_no_process_ends_with_75_before_all_know_and_none_where_one_has_died(tmp_path: Path) -> None:
    first, second = start_processes(2, train_command(write_recipe(tmp_path)), tmp_path / "logs")
    wait_until(lambda: (tmp_path / "run").exists(), [first, second])
    os.kill(second.pid, signal.SIGSTOP)
    os.kill(first.pid, signal.SIGTERM)
    time.sleep(2)
    assert first.returncode is None, first.output
    os.kill(second.pid, signal.SIGKILL)
    first.wait(timeout=60)
    assert first.returncode == 1, first.output


_FAILS_WHILE_ALL_END = """
import time
import torch.distributed as dist
from dynrank_ds.zero.early_stop import EarlyStop
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
leaving = []
early_stop = EarlyStop(lambda: True, lambda: (leaving.append(True), time.sleep(1)), exit_code=75)
early_stop.start()
try:
    while not leaving:
        time.sleep(0.01)
    raise RuntimeError("a collective failed, since the others have ended")
finally:
    early_stop.cancel()
"""


def test_a_collective_that_fails_because_others_ended_first_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", _FAILS_WHILE_ALL_END], timeout=60, check=False)
    assert done.returncode == 75


@pytest.fixture
def noted() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield note_signals()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_seen_while_the_main_thread_is_in_one_long_call(
    number: signal.Signals, noted: StopRequest
) -> None:
    seen: list[bool] = []

    def send() -> None:
        seen.append(noted.received)
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        seen.append(noted.received)

    thread = threading.Thread(target=send)
    data = os.urandom(20_000_000)
    thread.start()
    zlib.compress(data, 9)  # no instruction of Python's in between
    still_running = len(seen) < 2
    thread.join()
    assert not still_running and seen == [False, True]


def test_other_signals_ask_for_nothing(noted: StopRequest) -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)
    assert not noted.received


def test_torchrun_that_restarts_what_fails_is_given_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert exit_code_when_stopped() == 75
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert exit_code_when_stopped() == 75
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert exit_code_when_stopped() == 0
