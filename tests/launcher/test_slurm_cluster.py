"""launcher/slurm on a real SLURM of two nodes: signals, requeueing, a node that fails, an evaluation."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import slurm
from tests.support.launch import ROOT, train
from tests.support.recipes import lines, write_recipe

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]

STEPS = 60
OPTIONS = (f"train.steps={STEPS}", "method.interval=9")
EVALUATION = "--engine hf --dtype fp32 --max-new-tokens 8 --limit 4"


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a SLURM of two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    with slurm.cluster(folder):
        yield folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, data for an evaluation, and `whole`: the run of the recipe that was never stopped."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder)
    for name, count in (("gsm_symbolic", 6), ("gsm_symbolic_unseen", 3)):
        rows = [
            {"task_id": f"{name}-{i}", "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(2, recipe, *OPTIONS, f"output.dir={folder / 'whole'}")
    return folder


def submit(folder: Path, run: Path, *options: str) -> dict[str, str]:
    """The numbers of the jobs."""
    command = [
        sys.executable,
        str(ROOT / "launcher/slurm/submit.py"),
        "--recipe",
        str(folder / "recipe.yaml"),
    ]
    command += ["--gpus-per-node", "0", "--processes-per-node", "1", *options, *OPTIONS, f"output.dir={run}"]
    variables = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    jobs: dict[str, str] = json.loads((run / "slurm/job.json").read_text())["jobs"]
    return jobs


def logs(run: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in (run / "slurm").glob("*log*"))


def steps(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(text) for text in path.read_text().splitlines(keepends=True) if text.endswith("\n")]
        if (path.is_file())
        else []
    )


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run / "metrics.jsonl")]


def plans(run: Path) -> list[str]:
    return [line["plan_sha256"] for line in lines(run / "ranks.jsonl")]


def tasks_of(run: Path) -> list[psutil.Process]:
    """The training processes that note signals."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
        except (psutil.Error, OSError):
            continue
        is_task = f"{run}/slurm/code/launcher/train.py" in command and "srun" not in command[0]
        if is_task and int(caught, 16) >> (signal.SIGUSR1 - 1) & 1:
            found.append(process)
    return found


def state(run: Path) -> str:
    return str(json.loads((run / "state.json").read_text())["state"])


def test_a_job_that_is_stopped_twice_ends_as_one_that_never_was_and_is_scored(folder: Path) -> None:
    run = folder / "stopped"
    tasks = "eval.tasks=[gsm_symbolic,gsm_symbolic_unseen]"
    evaluation = ("--evaluate", "--evaluate-options", EVALUATION, tasks, f"eval.data_dir={folder}")
    jobs = submit(folder, run, "--nodes", "2", *evaluation)
    job = jobs["train"]

    # To one process of two, long before training begins.
    slurm.wait_until(lambda: len(tasks_of(run)) == 2, 120, lambda: logs(run))
    tasks_of(run)[-1].send_signal(signal.SIGUSR1)
    slurm.wait_until(lambda: "ended with exit code 75" in logs(run), 120, lambda: logs(run))
    assert logs(run).count("stopped by a signal before training began") == 1 and not steps(run)
    slurm.start_now(job)

    slurm.wait_until(lambda: len(steps(run)) >= 5, 240, lambda: logs(run))
    slurm.command("scancel", "--signal=USR1", job)
    slurm.wait_until(lambda: logs(run).count("ended with exit code 75") == 2, 120, lambda: logs(run))
    assert state(run) == "stopped" and 5 <= len(steps(run)) < STEPS
    slurm.start_now(job)

    slurm.wait_until(lambda: slurm.state_of(job) == "COMPLETED", 300, lambda: logs(run))
    assert state(run) == "finished"
    assert losses(run) == losses(folder / "whole") and plans(run) == plans(folder / "whole")

    slurm.wait_until(lambda: slurm.state_of(jobs["score"]) == "COMPLETED", 300, lambda: logs(run))
    one = [sys.executable, "-m", "dynrank_eval.cli", "run", "--model", str(folder / "model")]
    one += ["--adapter", str(run / "adapter"), "--task", "gsm_symbolic,gsm_symbolic_unseen"]
    one += ["--data-dir", str(folder), *shlex.split(EVALUATION), "--output", str(folder / "one-engine")]
    subprocess.run(one, check=True, cwd=ROOT)
    scores = [
        json.loads((out / "results.json").read_text())["tasks"]
        for out in (run / "eval/all", folder / "one-engine")
    ]
    assert scores[0] == scores[1]


def test_a_node_that_fails_leaves_the_job_to_the_other(cluster: Path, folder: Path) -> None:
    run = folder / "failed-node"
    job = submit(folder, run, "--nodes", "1-2", "train.checkpoint_interval=2")["train"]
    slurm.wait_until(lambda: len(steps(run)) >= 5, 240, lambda: logs(run))
    assert "start 1, on n[0-1]\n" in logs(run)
    slurm.stop_node(cluster, "n1")
    try:
        slurm.wait_for_end(job, 400, lambda: logs(run) + slurm.command("scontrol", "show", "job", job))
    finally:
        slurm.start_node("n1")
    assert "start 2, on n0\n" in logs(run)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 1
    whole = losses(folder / "whole")
    assert max(abs(a - b) for a, b in zip(losses(run), whole, strict=True)) <= 1e-6
    assert plans(run) == plans(folder / "whole")
