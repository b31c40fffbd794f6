"""Running the training command and workers in several processes on one machine.

Processes are forked from one that has imported everything: they start in a tenth of a second instead of ten. The
command as a shell starts it is tested where that matters (tests/launcher, tests/zero/test_signals.py).
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(
    [
        "dynrank_ds.training.run",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it, and with it torch's compiler, late
        "tests.support.watching",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.tokenization_llama",
        "tests.support.frozen",
    ]
)


class Started:
    """A process of a run; what it prints goes to a file, for a pipe that nobody reads would stop it."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._process = _FORKING.Process(target=_become, args=(list(command), environment, log))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(f"a process ran for more than {timeout} s:\n{self.output[-4000:]}")


def launcher_script(name: str) -> ModuleType:
    """A script of launcher/, as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "launcher" / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> str:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_processes(
    world_size: int, command: Sequence[str], logs: Path, port: str | None = None
) -> list[Started]:
    """Start `command` (what follows `python`) as `world_size` gloo processes that write to files in `logs`.

    port: that they meet at, by default a free one.
    """
    port = port or free_port()
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs.mkdir(parents=True, exist_ok=True)
    return [
        Started(
            command,
            {**before, **_ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            logs / f"{port}-{rank}.log",
        )
        for rank in range(world_size)
    ]


def _become(command: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        run_script(*command)


def run_script(path: str, *arguments: str) -> None:
    """A Python file as the main program of this process."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def wait(processes: Sequence[Started], timeout: float = 600) -> None:
    """Waits for them to end."""
    for process in processes:
        process.wait(timeout)


def wait_until(condition: Callable[[], object], processes: Sequence[Started]) -> None:
    """Waits for something that the running processes will do."""
    while not condition():
        assert all(process.returncode is None for process in processes), [p.output for p in processes]
        time.sleep(0.02)


def notes_signals(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1; False where it has ended."""
    status = Path(f"/proc/{pid}/status")
    caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text() if status.exists() else "", re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def reported_errors(processes: Sequence[Started]) -> list[str]:
    """The sentences that ended them."""
    return [line for p in processes for line in p.output.splitlines() if line.startswith("error:")]


def train_command(recipe: Path, *overrides: str) -> list[str]:
    """`launcher/train.py --recipe RECIPE OVERRIDES`, for Python."""
    return [str(ROOT / "launcher/train.py"), "--recipe", str(recipe), *overrides]


def run_worker(world_size: int, name: str, folder: Path, *arguments: str, timeout: float = 1800) -> None:
    """tests/zero/workers/NAME.py in `world_size` processes, which must succeed."""
    command = ["-m", f"tests.zero.workers.{name}", str(folder), *arguments]
    _must_succeed(start_processes(world_size, command, folder / "logs"), timeout)


def outcomes(folder: Path, name: str, world_size: int) -> list[Any]:
    """What each process of a worker wrote under that name."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world_size)]


def train(world_size: int, recipe: Path, *overrides: str) -> list[Started]:
    """`launcher/train.py --recipe RECIPE OVERRIDES` in `world_size` processes, which must succeed."""
    processes = start_processes(world_size, train_command(recipe, *overrides), recipe.parent / "logs")
    _must_succeed(processes, timeout=600)
    return processes


def _must_succeed(processes: Sequence[Started], timeout: float) -> None:
    wait(processes, timeout)
    for process in processes:
        assert process.returncode == 0, process.output[-6000:]


def quick_benchmark(name: str, recipe: Path) -> str:
    """Return what `python -m dynrank_ds.bench NAME --quick` prints of a recipe; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "dynrank_ds.bench", name, "--quick", "--recipe", str(recipe)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
