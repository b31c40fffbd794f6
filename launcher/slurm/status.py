"""Prints how a run stands, from its directory and squeue.

python launcher/slurm/status.py runs/my
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

_RECENT = 20
"""Steps whose times are averaged."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Print how a run stands.", epilog="example: python launcher/slurm/status.py runs/my"
    )
    parser.add_argument("run", type=Path, help="run directory")
    run = parser.parse_args(argv).run
    if not (run / "recipe.resolved.yaml").is_file() and not (run / "slurm").is_dir():
        print(
            f"error: {run} is no run directory: it holds neither a run nor a submitted job", file=sys.stderr
        )
        return 2
    for name, value in status(run).items():
        print(f"{name:<16} {value}")
    return 0


def status(run: Path) -> dict[str, str]:
    """What there is to say, by name."""
    state: dict[str, Any] = json.loads(text) if (text := _text(run / "state.json")) else {}
    steps, adjustments = _lines(run / "metrics.jsonl"), _lines(run / "ranks.jsonl")
    jobs = _jobs(run)
    said = {"job": "; ".join(jobs) or "none in the queue"}
    said["state"] = state.get("state", "training has not begun")
    if (
        said["state"] in ("starting", "running")
        and not any("RUNNING" in job for job in jobs)
        and (run / "slurm").is_dir()
    ):
        said["state"] = "no job is running: killed, or waiting to be started again"
    step, total = steps[-1]["step"] if steps else 0, state.get("total_steps")
    said["step"] = f"{step} of {total}" if total else str(step)
    if steps:
        recent = steps[-_RECENT:]
        seconds = sum(line["seconds"] for line in recent) / len(recent)
        rate = sum(line["tokens_per_second"] for line in recent) / len(recent)
        said["tokens/s"] = f"{rate:.0f} (mean of the last {len(recent)} steps, {seconds:.2f} s each)"
        said["loss"] = str(steps[-1]["loss"])
        if total and step < total:
            left = timedelta(seconds=round(seconds * (total - step)))
            end = datetime.now() + left
            said["estimated end"] = f"{end:%Y-%m-%d %H:%M}, after {left} of training"
    if adjustments:
        last = adjustments[-1]
        changed = sum(last["before"][name] != last["after"][name] for name in last["after"])
        said["last adjustment"] = (
            f"step {last['step']}: {changed} of {len(last['after'])} modules changed, total rank "
            f"{sum(last['before'].values())} -> {sum(last['after'].values())}"
        )
    if error := state.get("error") or _last_error(run):
        said["last error"] = error
    if state:
        said["how to continue"] = state["how_to_continue"]
    return said


def _jobs(run: Path) -> list[str]:
    """`12 train RUNNING on n[0-1]`, of the jobs that are in the queue."""
    text = _text(run / "slurm" / "job.json")
    if not text or shutil.which("squeue") is None:
        return []
    found = []
    for name, job in json.loads(text)["jobs"].items():
        command = ["squeue", "-h", "-j", job, "-o", "%i|%T|%R"]
        # A job that SLURM has forgotten is an error of squeue's.
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            number, state, where = line.split("|")
            found.append(f"{number} {name} {state} {where}")
    return found


def _last_error(run: Path) -> str | None:
    """The last line that names an error in the newest log of a node."""
    logs = sorted((run / "slurm").glob("log-*.txt"), key=lambda path: path.stat().st_mtime)
    for log in reversed(logs):
        for line in reversed(log.read_text(errors="replace").splitlines()):
            if re.match(r"(\d+: )?(error: |ERROR |\w*Error: )", line):
                return line
    return None


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, without one that is being written."""
    found = []
    for line in _text(path).splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


if __name__ == "__main__":
    sys.exit(main())
