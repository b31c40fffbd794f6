"""Tries every escape on this machine and looks at what it did."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dynrank_eval.sandbox.escapes import ESCAPES, Escape
from dynrank_eval.sandbox.isolation import Isolation, detect
from dynrank_eval.sandbox.limits import Limits, Program
from dynrank_eval.sandbox.runner import run_programs

_LIMITS = Limits(wall_seconds=3.0)


@dataclass(frozen=True)
class Attempt:
    """`held`: it did not pass, and got a verdict that is right for it. Outcome "not tried": it would destroy."""

    name: str
    aim: str
    outcome: str
    held: bool


@dataclass(frozen=True)
class Report:
    """`harm`: what the attempts left behind, destroyed or stopped; empty is right."""

    isolation: Isolation
    attempts: list[Attempt]
    harm: list[str]


def attempt_all(
    workers: int | None = None, isolation: Isolation | None = None, escapes: Sequence[Escape] = ESCAPES
) -> Report:
    """Run the escapes against targets put up for them, and an honest program that must pass."""
    isolation = isolation or detect()
    # Programs of root's run as another user; an ordinary user's could end everything that the user runs.
    exposed = os.geteuid() != 0 and "processes" in isolation.missing()
    spared = [escape for escape in escapes if exposed and escape.kills]
    escapes = [escape for escape in escapes if escape not in spared]
    with _Targets.put_up() as targets:
        honest = f"def solve(): return {targets.secret!r}"
        sources = [honest, *(targets.aimed(escape.source) for escape in escapes)]
        tests = (f"assert solve() == {targets.secret!r}",)
        programs = [Program(source, tests, ("solve",)) for source in sources]
        results = run_programs(programs, _LIMITS, isolation, workers, targets.cells)
        harm = targets.harm()
    outcomes = [result.outcome.value for result in results]
    if outcomes[0] != "passed":
        harm.append(f"an honest program got the verdict {outcomes[0]}")
    attempts = [
        Attempt(escape.name, escape.aim, outcome, outcome in escape.outcomes)
        for escape, outcome in zip(escapes, outcomes[1:], strict=True)
    ]
    attempts += [Attempt(escape.name, escape.aim, "not tried", False) for escape in spared]
    return Report(isolation, attempts, harm)


class _Targets:
    """What the escapes are after: a file, a folder, sockets and a process, all holding the same secret."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.secret = secrets.token_hex(16)
        # Its name is in the command lines of the processes that it holds.
        self.cells = folder / f"cells-{secrets.token_hex(8)}"
        self._folder = folder / "outside"
        self._file = self._folder / "secret"
        for place in (self.cells, self._folder):
            place.mkdir()
        folder.chmod(0o755)
        self.cells.chmod(0o711)
        self._folder.chmod(0o777)
        self._file.write_text(self.secret)
        self._file.chmod(0o666)
        self._mark = f"{secrets.randbelow(10**6) + 10**6}.5"
        self._victim = subprocess.Popen(
            ["sleep", "100000"], env={**os.environ, "DYNRANK_SECRET": self.secret}, start_new_session=True
        )
        stack.callback(self._end_victim)
        self._abstract = f"dynrank-{secrets.token_hex(8)}"
        self._socket = folder / "socket"
        self._port = self._serve(stack)
        self._before = _kernel_objects()

    @classmethod
    @contextmanager
    def put_up(cls) -> Iterator["_Targets"]:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dynrank-check-"))
            yield cls(Path(folder), stack)

    def _serve(self, stack: ExitStack) -> int:
        tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        port = int(tcp.getsockname()[1])
        udp.bind(("127.0.0.1", port))
        by_path, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        by_path.bind(str(self._socket))
        self._socket.chmod(0o777)
        abstract.bind(f"\0{self._abstract}")
        for server in (by_path, abstract):
            server.listen()
        for server in (tcp, by_path, abstract):
            threading.Thread(target=self._answer_connections, args=(server,), daemon=True).start()
        threading.Thread(target=self._answer_datagrams, args=(udp,), daemon=True).start()
        for server in (tcp, udp, by_path, abstract):
            stack.callback(server.close)
            # Closing alone does not wake a thread that waits in accept().
            stack.callback(_shut_down, server)
        return port

    def _answer_connections(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self.secret.encode())

    def _answer_datagrams(self, server: socket.socket) -> None:
        while True:
            try:
                _, sender = server.recvfrom(99)
            except OSError:
                return
            if sender is None:
                return
            server.sendto(self.secret.encode(), sender)

    def _end_victim(self) -> None:
        self._victim.kill()
        self._victim.wait()

    def aimed(self, source: str) -> str:
        """Return the escape's source with the targets' addresses."""
        addresses = {
            "FILE": str(self._file),
            "FOLDER": str(self._folder),
            "PORT": str(self._port),
            "SOCKET": str(self._socket),
            "ABSTRACT": self._abstract,
            "VICTIM": str(self._victim.pid),
            "EVALUATOR": str(os.getpid()),
            "MARK": self._mark,
        }
        for name, address in addresses.items():
            source = source.replace(f"@{name}@", address)
        return source

    def harm(self) -> list[str]:
        found = []
        if not self._file.is_file() or self._file.read_text() != self.secret:
            found.append("a file outside was changed or removed")
        found += [f"a file outside was made: {p.name}" for p in self._folder.iterdir() if p != self._file]
        found += [f"a program's folder was left: {place.name}" for place in self.cells.iterdir()]
        if self._victim.poll() is not None:
            found.append("another process was killed")
        found += [f"a process was left: {line}" for line in _processes_with(self.cells.name, self._mark)]
        found += [f"a kernel object was left: {line}" for line in _kernel_objects() - self._before]
        folders = [*sys.path, sys.prefix, os.path.dirname(os.__file__)]
        found += [
            f"{place} was written to" for place in folders if (Path(place) / "dynrank_escape.pth").exists()
        ]
        return found


def _shut_down(server: socket.socket) -> None:
    try:
        server.shutdown(socket.SHUT_RDWR)
    except OSError:
        # Not connected: the thread is woken all the same.
        return


def _processes_with(*arguments: str) -> list[str]:
    """Return the command lines of the processes that have one of these in theirs."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = command.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(argument in line for argument in arguments):
            found.append(line.strip())
    return found


def _kernel_objects() -> set[str]:
    """Return the System V memory segments and shared-memory files that escapes might leave."""
    segments = Path("/proc/sysvipc/shm")
    lines = segments.read_text().splitlines()[1:] if segments.exists() else []
    ours = {f"segment {line.split()[0]}" for line in lines if int(line.split()[0]) == 0x64796E72}
    return ours | {str(place) for place in Path("/dev/shm").glob("dynrank-escape-*")}
