"""One sandboxed interpreter: started, watched and ended from outside."""

import json
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynrank_ds.errors import MachineError
from dynrank_eval.sandbox.isolation import INSIDE, Isolation
from dynrank_eval.sandbox.limits import Limits

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LONGEST_LINE = 512
_WATCH_SECONDS = 0.1
_ENDING_SECONDS = 10.0


class Cell:
    """A process that confines itself and then plays its role (inside/__main__.py).

    Args:
        request: its role, and the descriptors `reader` and `writer` of its channel to the other cell.
        folder: its own, empty; its working directory where there is no file-system namespace.
        uid: the user to become; None: stay.
        tasks: RLIMIT_NPROC, which counts all tasks of its user.
    """

    def __init__(
        self,
        request: dict[str, Any],
        isolation: Isolation,
        limits: Limits,
        folder: Path,
        uid: int | None,
        tasks: int,
    ) -> None:
        self._isolation, self._limits, self._folder, self._uid = isolation, limits, folder, uid
        if uid is not None:
            os.chown(folder, uid, uid)
        self._report, report = os.pipe()
        confinement = isolation.confinement(folder)
        confinement |= {"uid": uid, "limits": _rlimits(limits, tasks)}
        self._process = subprocess.Popen(
            [*isolation.command(limits), "-s", "-S", str(INSIDE), f"{folder.parent.name}/{folder.name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(isolation.working_folder(folder)),
            pass_fds=[report, request["reader"], request["writer"]],
            start_new_session=True,
        )
        os.close(report)
        self._exited = os.pidfd_open(self._process.pid)
        self._send(json.dumps({**request, "report": report, "confinement": confinement}).encode())

    def _send(self, request: bytes) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                stdin.write(request)
        except BrokenPipeError:
            # It died before it read: `await_ready` finds no "ready" and says so.
            return

    def await_ready(self, seconds: float) -> None:
        """Return once the limits hold; MachineError where they cannot."""
        line = self.read_line(seconds)
        if line != "ready":
            reason = line or f"the interpreter did not start within {seconds:.0f} s or ended at once"
            raise MachineError(f"the sandbox cannot start a program: {reason}.")
        for pid in _tree(self._process.pid):
            _kill_first_without_memory(pid)

    def read_line(self, seconds: float, watched: "Cell | None" = None) -> str | None:
        """Return the next line reported; empty when the process is gone; None at the deadline.

        `watched` is a cell that must stay within its memory and disk meanwhile: beyond, the line is empty too.
        """
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self._report, select.POLLIN)
        poller.register(self._exited, select.POLLIN)
        line = b""
        while len(line) < _LONGEST_LINE:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            ready = [fd for fd, _ in poller.poll(1000 * min(remaining, _WATCH_SECONDS))]
            if not ready:
                if watched is not None and watched.uses_too_much():
                    return ""
                continue
            byte = os.read(self._report, 1) if self._report in ready else b""
            if byte == b"":
                return ""
            if byte == b"\n":
                return line.decode(errors="replace")
            line += byte
        return ""

    def uses_too_much(self) -> bool:
        """Whether it has more memory over all its processes, or more disk over all its files, than allowed."""
        memory = sum(_resident_bytes(pid) for pid in _tree(self._process.pid))
        return memory > self._limits.memory_bytes or _disk_bytes(self._folder) > self._limits.disk_bytes

    def end(self) -> None:
        """Kill everything in it and wait until it is gone."""
        if self._isolation.bwrap is not None:
            self._end_namespace()
        else:
            # Its leader is not reaped yet, so the group's id cannot have gone to anybody else.
            os.killpg(self._process.pid, signal.SIGKILL)
            if self._uid is not None:
                _kill_user(self._uid)
        self._process.wait()
        deadline = time.monotonic() + 1.0
        while _group_exists(self._process.pid) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.close(self._exited)
        os.close(self._report)

    def _end_namespace(self) -> None:
        """Kill the first process of the namespace: the kernel kills all others, and then bubblewrap ends too."""
        first = _children(self._process.pid)
        for pid in first:
            _kill(pid)
        try:
            self._process.wait(_ENDING_SECONDS if first else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _environment(folder: str) -> dict[str, str]:
    # A fixed hash seed: a set's order, and with it many a wrong solution's verdict, would change from run to run.
    # Otherwise the interpreter is as isolated as with -I, which would make it ignore the seed; -S spares it the
    # start-up files of installed packages, whose folders confine.py adds.
    return {
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _rlimits(limits: Limits, tasks: int) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(limits.wall_seconds) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": tasks,
        "RLIMIT_CORE": 0,
    }


def tasks_of(uid: int) -> int:
    """Count a user's processes and threads."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == uid:
                count += len(list((process / "task").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return count


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in _children(pid):
        yield from _tree(child)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _disk_bytes(folder: Path) -> int:
    total = 0
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # gone meanwhile, a path too long, a folder without rights
                continue
    return total


def _kill_first_without_memory(pid: int) -> None:
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    except PermissionError:
        # bubblewrap's own processes, which hold no memory of the program's.
        return


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _kill_user(uid: int) -> None:
    """Kill every process of a user that is nobody's, children that left the group too, until none is left."""
    while found := [p for p in Path("/proc").glob("[0-9]*") if _belongs(p, uid)]:
        for process in found:
            _kill(int(process.name))
        time.sleep(0.005)


def _belongs(process: Path, uid: int) -> bool:
    try:
        alive = "\nState:\tZ" not in (process / "status").read_text()
        return alive and process.stat().st_uid == uid
    except (FileNotFoundError, ProcessLookupError):
        return False


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
