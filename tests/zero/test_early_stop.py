"""A signal to any process before training begins ends all of them, and nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrank_ds.training.signals import SIGNALS, StopRequest, exit_code_when_stopped, note_signals
from tests.support.launch import Started, start_processes, train_command, wait, wait_until
from tests.support.recipes import write_recipe


def notes_signals(process: Started) -> bool:
    """Whether the process has a handler for SIGUSR1."""
    [caught] = [
        line.split()[1]
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith("SigCgt:")
    ]
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_before_training_ends_both_soon(victim: int, tmp_path: Path) -> None:
    processes = start_processes(2, train_command(write_recipe(tmp_path)), tmp_path / "logs")
    # The other one has not even come to the rendezvous.
    os.kill(processes[1 - victim].pid, signal.SIGSTOP)
    wait_until(lambda: notes_signals(processes[victim]), processes)
    os.kill(processes[victim].pid, signal.SIGUSR1)
    os.kill(processes[1 - victim].pid, signal.SIGCONT)
    wait(processes, timeout=60)
    outputs = [process.output for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    assert [output.count("stopped by a signal before training began") for output in outputs] == [1, 0]
    # On a fast machine the run's files are there before the stop is seen: `resume=auto` begins with them.
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert written <= {".run.lock", "recipe.resolved.yaml", "environment.json", "checkpoints"}


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
