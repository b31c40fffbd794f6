"""Running the real training command in several processes on one machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start_processes(world_size: int, command: Sequence[str], **env: str) -> list[subprocess.Popen]:
    """Starts `command` as `world_size` gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        variables = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            **env,
        }
        # Into files: a pipe that nobody reads fills up, and its process would stop while the others wait for it.
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        process = subprocess.Popen(
            [sys.executable, *command], env=variables, stdout=log, stderr=subprocess.STDOUT
        )
        process.log = log  # type: ignore[attr-defined]
        processes.append(process)
    return processes


def wait(processes: Sequence[subprocess.Popen], timeout: float = 600) -> None:
    """Waits for them; their output is in `.output`."""
    for process in processes:
        process.wait(timeout)
        process.log.seek(0)  # type: ignore[attr-defined]
        process.output = process.log.read()  # type: ignore[attr-defined]
        process.log.close()  # type: ignore[attr-defined]


def run_processes(
    world_size: int, command: Sequence[str], timeout: float = 600, **env: str
) -> list[subprocess.Popen]:
    """Runs `command` as `world_size` gloo processes and waits for them; their output is in `.output`."""
    processes = start_processes(world_size, command, **env)
    wait(processes, timeout)
    return processes


def train_command(recipe: Path, *overrides: str) -> list[str]:
    """`launcher/train.py --recipe RECIPE OVERRIDES`, for Python."""
    return [str(ROOT / "launcher/train.py"), "--recipe", str(recipe), *overrides]


def run_worker(world_size: int, name: str, *arguments: str) -> None:
    """tests/zero/workers/NAME.py in `world_size` processes, which must succeed."""
    command = ["-m", f"tests.zero.workers.{name}", *arguments]
    for process in run_processes(world_size, command, timeout=1800):
        assert process.returncode == 0, process.output[-6000:]  # type: ignore[attr-defined]


def outcomes(folder: Path, name: str, world_size: int) -> list[Any]:
    """What each process of a worker wrote under that name."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world_size)]


def train(world_size: int, recipe: Path, *overrides: str, **env: str) -> list[subprocess.Popen]:
    """`launcher/train.py --recipe RECIPE OVERRIDES` in `world_size` processes, which must succeed."""
    processes = run_processes(world_size, train_command(recipe, *overrides), **env)
    for process in processes:
        assert process.returncode == 0, process.output[-4000:]  # type: ignore[attr-defined]
    return processes
