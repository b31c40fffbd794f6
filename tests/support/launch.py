"""Running the real training command in several processes on one machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_processes(
    world_size: int, command: Sequence[str], timeout: float = 600, **env: str
) -> list[subprocess.Popen]:
    """Runs `command` as `world_size` gloo processes and waits for them; their output is in `.output`."""
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
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        process.output = process.communicate(timeout=timeout)[0]  # type: ignore[attr-defined]
    return processes


def train(world_size: int, recipe: Path, *overrides: str, **env: str) -> list[subprocess.Popen]:
    """`launcher/train.py --recipe RECIPE OVERRIDES` in `world_size` processes, which must succeed."""
    processes = run_processes(
        world_size, [str(ROOT / "launcher/train.py"), "--recipe", str(recipe), *overrides], **env
    )
    for process in processes:
        assert process.returncode == 0, process.output[-4000:]  # type: ignore[attr-defined]
    return processes
