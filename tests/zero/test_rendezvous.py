"""Processes that do not meet: what is said, and when it ends."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from dynrank_ds.errors import MachineError
from dynrank_ds.zero import rendezvous
from tests.support.launch import free_port, reported_errors, start_processes, train_command
from tests.support.recipes import write_recipe


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "node-that-is.invalid")
    return monkeypatch


def test_a_name_that_does_not_resolve_is_an_error_after_the_time_for_it(
    two_processes: pytest.MonkeyPatch,
) -> None:
    assert rendezvous.RESOLVE_SECONDS == 60
    began = time.monotonic()
    with pytest.raises(
        MachineError, match=r"MASTER_ADDR 'node-that-is\.invalid' does not resolve on .*: set it"
    ):
        rendezvous.wait_for_name(0.5)
    assert time.monotonic() - began >= 0.5


def test_a_name_that_resolves_after_a_while_is_waited_for(two_processes: pytest.MonkeyPatch) -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with patch.object(socket, "getaddrinfo", side_effect=[unknown, []]) as resolver:
        rendezvous.wait_for_name(5)
    assert resolver.call_count == 2


def test_each_node_says_that_it_waits(
    two_processes: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), rendezvous.watched(600, 0.1):
        deadline = time.monotonic() + 30
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    said = len(caplog.records)
    assert said >= 2
    assert "waited 0 s for all 2 processes to meet at node-that-is.invalid:29500" in caplog.messages[0]
    time.sleep(0.3)
    two_processes.setenv("LOCAL_RANK", "1")
    with caplog.at_level(logging.WARNING), rendezvous.watched(600, 0.1):
        time.sleep(0.3)
    assert len(caplog.records) == said


@pytest.mark.slow
def test_an_address_that_is_silent_is_an_error_at_the_timeout(tmp_path: Path) -> None:
    command = train_command(write_recipe(tmp_path), "deepspeed.timeout=4")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        first, second = start_processes(2, command, tmp_path / "logs", port=port)
        first.wait(60)
        second.wait(120)
    assert second.returncode == 2, second.output
    assert f"the 2 processes did not all meet at 127.0.0.1:{port} within 4 s: it takes" in second.output
    assert not (tmp_path / "run").exists()


def test_a_first_process_whose_others_do_not_come_ends_at_the_timeout(tmp_path: Path) -> None:
    command = train_command(write_recipe(tmp_path), "deepspeed.timeout=4")
    first, second = start_processes(2, command, tmp_path / "logs", port=free_port())
    os.kill(second.pid, 9)
    first.wait(120)
    assert first.returncode == 2, first.output
    [message] = reported_errors([first])
    assert "within 4 s" in message
