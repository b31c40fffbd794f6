"""Where the checks run: processes, device, a small model and its data; recipes for them, and starting them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynrank_ds.zero.config import load_config
from launcher.gpu_check.outcome import CheckFailedError

STEPS = 6
STOPPED_AT = 3
"""The step whose checkpoint is resumed from."""
SECONDS = 300
"""For which one command may run."""


@dataclass(frozen=True)
class Setting:
    """What every check is given."""

    device: str
    """"cuda" or "cpu"."""
    processes: int
    folder: Path
    """Where everything is written."""
    model: Path
    data: Path
    """MetaMathQA rows."""

    @property
    def dtype(self) -> str:
        """What runs compute in: bf16 on GPUs, and fp32 on CPUs, where bf16 may take a hundred times longer."""
        return "bf16" if self.device == "cuda" else "fp32"

    @property
    def tolerance(self) -> float:
        """Relative difference of losses that rounding explains."""
        return 2e-2 if self.dtype == "bf16" else 1e-4

    def recipe(self, name: str, **sections: dict[str, Any]) -> Path:
        """Write the recipe of a run of STEPS steps with two adjustments into `runs/NAME`, and return its file.

        sections: keys over those of every run.
        """
        values: dict[str, dict[str, Any]] = {
            "model": {"path": str(self.model), "dtype": self.dtype, "attention": "sdpa"},
            "data": {"source": str(self.data), "max_length": 256, "max_dropped": 1.0},
            "adapter": {"rank": 4, "alpha": 16.0},
            "method": {"name": "pe_dyra", "t_i": 1, "interval": 2, "t_f": 0, "k": 5},
            "train": {
                "steps": STEPS,
                "global_batch_size": 2 * self.processes,
                "micro_batch_size": 1,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "checkpoint_interval": STOPPED_AT,
                "activation_checkpointing": True,
            },
            "deepspeed": {"config": "zero3", "timeout": 120},
            "output": {"dir": str(self.folder / "runs" / name)},
        }
        for section, keys in sections.items():
            other = "name" in keys and keys["name"] != values[section].get("name")
            values[section] = keys if other else values[section] | keys
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def run_directory(self, name: str) -> Path:
        """Return where the run of recipe `name` writes."""
        return self.folder / "runs" / name

    def losses(self, name: str) -> list[float]:
        """Return the loss of every step of a finished run."""
        return [float(line["loss"]) for line in self.metrics(name)]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a run's metrics.jsonl."""
        text = (self.run_directory(name) / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def config_file(self, name: str, **zero: Any) -> str:
        """Write a shipped DeepSpeed configuration with other keys of `zero_optimization`; return its path."""
        config = load_config(name, bf16=False)
        config["zero_optimization"] |= zero
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(config))
        return str(path)

    def work(self, name: str, *words: str, processes: int | None = None) -> None:
        """Run `launcher.gpu_check.worker WORDS` in processes that form a group; by default in all.

        Raises:
            CheckFailedError: it failed, with the last line of its output.
        """
        count = str(processes or self.processes)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
        self.command(name, sys.executable, *launch, "-m", "launcher.gpu_check.worker", *words)

    def command(self, name: str, *words: str, **environment: str) -> None:
        """Run a command with its output in `logs/NAME.log`, and end it after SECONDS.

        Raises:
            CheckFailedError: it failed, with the last line of its output.
        """
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", **environment}
        own["DS_ACCELERATOR"] = self.device
        if self.device == "cpu":
            own["OMP_NUM_THREADS"] = "1"
        with log.open("w") as file:
            started = subprocess.Popen(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                start_new_session=True,
            )
            try:
                code = started.wait(SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
                raise CheckFailedError(f"not done after {SECONDS} s: see {log}") from None
        if code:
            raise CheckFailedError(f"exit code {code}: {last_error(log)} (see {log})")


def last_error(log: Path) -> str:
    """Return the sentence or exception that a command ended with, as far as its output shows."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if line.startswith("error: ") or "Error: " in line.split(" ", 2)[0] + " "
    ]
    return (errors or lines or ["no output"])[-1][:300]
