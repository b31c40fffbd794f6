"""launcher/slurm: what is checked, written and submitted, with commands that stand in for SLURM's.

tests/launcher/test_slurm_cluster.py runs the real ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from dynrank_ds.training.rundir import check_output
from tests.support.launch import launcher_script
from tests.support.recipes import write_recipe


def script(name: str) -> ModuleType:
    return launcher_script(f"slurm/{name}.py")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch that gives numbers from 7 on and notes its arguments, squeue that knows of a job where a file says so."""
    folder = tmp_path / "bin"
    folder.mkdir()
    bodies = {
        "sbatch": f'echo "$@" >> {tmp_path}/calls; echo $((6 + $(wc -l < {tmp_path}/calls)))',
        "squeue": f'cat {tmp_path}/queue 2> /dev/null; echo "slurm_load_jobs error: Invalid job id" >&2',
    }
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


TWO_NODES = ("--nodes", "2", "--gpus-per-node", "3", "--time", "1:00:00", "--partition", "gpu")


def files(printed: str, folder: Path) -> dict[str, str]:
    """The batch files that --dry-run printed."""
    parts = printed.split(f"== {folder}/")[1:]
    return {part.splitlines()[0]: part.split("\n", 1)[1] for part in parts}


def test_a_dry_run_prints_the_batch_files_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--wrap", "apptainer exec --nv image.sif", "--evaluate", "--dry-run")
    options += ("--evaluate-options", "--engine hf --limit 9")
    tasks = "eval.tasks=[gsm8k,humaneval]"
    assert script("submit").main(["--recipe", str(recipe), *TWO_NODES, *options, tasks]) == 0
    found = files(capsys.readouterr().out, tmp_path / "run/slurm")
    assert list(found) == ["train.sbatch", "evaluate.sbatch", "score.sbatch"]
    for name, text in found.items():
        assert not re.search("@[A-Z_]+@", text), name
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    train = found["train.sbatch"]
    for line in (
        "nodes=2",
        "mincpus=3",
        "gpus-per-node=3",
        "time=1:00:00",
        "partition=gpu",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in train
    assert "#SBATCH --signal=USR1@180\n" in train and "#SBATCH --open-mode=append\n" in train
    assert "apptainer exec --nv image.sif python -u" in train
    assert (
        "#SBATCH --array=0-1\n" in found["evaluate.sbatch"]
        and "#SBATCH --gpus=1\n" in found["evaluate.sbatch"]
    )
    assert "--engine hf --limit 9 --output" in found["evaluate.sbatch"]
    assert (
        "tasks=(gsm8k humaneval)\n" in found["score.sbatch"]
        and "    --limit 9 --output" in found["score.sbatch"]
    )
    assert not (tmp_path / "run").exists()


def test_the_plan_of_the_fewest_nodes_is_printed_where_the_memory_of_a_gpu_is_given(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--nodes", "2-3", "--gpus-per-node", "1", "--gpu-memory-gib", "80", "--gpu", "a100")
    assert script("submit").main(["--recipe", str(recipe), *options, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "samples a step: 2 GPUs x 1 x 3 accumulated" in said and "of 80.00\n" in said
    assert "verdict     fits" in said and "(a100)" in said


def test_recipe_and_code_are_frozen_in_a_folder_that_training_accepts(
    recipe: Path, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--after", "3", "--evaluate", "eval.tasks=[gsm8k,math]")
    arguments = ["--recipe", str(recipe), *TWO_NODES, *options, "train.learning_rate=1e-4"]
    assert script("submit").main(arguments) == 0
    run = commands / "run"
    frozen = yaml.safe_load((run / "slurm/recipe.yaml").read_text())
    assert frozen["train"]["learning_rate"] == 1e-4 and frozen["output"]["dir"] == str(run)
    code = run / "slurm/code"
    for name in ("dynrank_ds/recipe.py", "dynrank_ds/recipes/quickstart.yaml", "dynrank_eval/cli.py"):
        assert (code / name).is_file()
    assert (code / "REVISION").read_text().strip()
    check_output(run, resume=True)
    calls = (commands / "calls").read_text().splitlines()
    assert calls == [
        f"--parsable --dependency=afterok:{after} {run}/slurm/{name}.sbatch"
        for after, name in ((3, "train"), (7, "evaluate"), (8, "score"))
    ]
    assert json.loads((run / "slurm/job.json").read_text())["jobs"] == {
        "train": "7",
        "evaluate": "8",
        "score": "9",
    }
    assert f"status.py {run}" in capsys.readouterr().out


def test_a_second_job_for_a_run_is_refused_while_the_first_is_queued(
    recipe: Path, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", str(recipe), *TWO_NODES]
    assert script("submit").main(arguments) == 0
    (commands / "queue").write_text("PENDING\n")
    assert script("submit").main(arguments) == 2
    assert f"error: job 7 of {commands / 'run'} is PENDING" in capsys.readouterr().err
    (commands / "queue").unlink()
    assert script("submit").main(arguments) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--nodes", "3", "--gpus-per-node", "4"), "train.global_batch_size 6 is no multiple of"),
        (("--nodes", "1-4", "--gpus-per-node", "1"), "x 4 processes = 4"),
        (("--nodes", "two", "--gpus-per-node", "1"), "--nodes is 'two': give a number, or MIN-MAX"),
        (("--gpus-per-node", "0"), "--gpus-per-node is 0: give --processes-per-node"),
        (("--gpus-per-node", "1", "--evaluate"), "eval.tasks of the recipe names no task"),
        (("--gpus-per-node", "1", "--gpu-memory-gib", "1"), "by its plan the run does not fit: "),
        (("--gpus-per-node", "1", "train.stepz=3"), "did you mean 'steps'?"),
        (("--gpus-per-node", "1", "model.path=/nowhere"), "model.path"),
        (("--gpus-per-node", "1", "output.dir=runs/with a blank"), "need a path of letters"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(
    options: tuple[str, ...], sentence: str, recipe: Path, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("submit").main(["--recipe", str(recipe), *options]) == 2
    [message] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in message
    assert not (commands / "run").exists() and not (commands / "calls").exists()


def test_a_refusal_of_sbatch_is_passed_on(
    recipe: Path, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (commands / "bin/sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition gpu' >&2; exit 1\n"
    )
    assert script("submit").main(["--recipe", str(recipe), *TWO_NODES]) == 2
    assert "train.sbatch: sbatch: error: invalid partition gpu" in capsys.readouterr().err


def test_status_says_how_a_run_stands(
    recipe: Path, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("status").main([str(commands / "nowhere")]) == 2
    assert script("submit").main(["--recipe", str(recipe), *TWO_NODES]) == 0
    run = commands / "run"
    (commands / "queue").write_text("7|RUNNING|n[0-1]\n")
    state = {
        "state": "running",
        "step": 0,
        "total_steps": 20,
        "how_to_continue": "it is running",
        "error": None,
    }
    (run / "state.json").write_text(json.dumps(state))
    step = {"loss": 0.5, "tokens_per_second": 30.0, "seconds": 2.0}
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, **step}) + "\n" for n in (1, 2)) + '{"st'
    )
    adjustment = {"step": 2, "before": {"a": 4, "b": 4}, "after": {"a": 5, "b": 4}}
    (run / "ranks.jsonl").write_text(json.dumps(adjustment) + "\n")
    (run / "slurm/log-7-n1.txt").write_text("0: step\n1: error: process 0 died or hung\n1: more\n")
    capsys.readouterr()
    assert script("status").main([str(run)]) == 0
    said = dict(
        line.split(None, 1) for line in capsys.readouterr().out.replace("last ", "last-").splitlines()
    )
    assert said["job"] == "7 train RUNNING n[0-1]" and said["state"] == "running"
    assert said["step"] == "2 of 20" and said["tokens/s"].startswith("30 ")
    assert "after 0:00:36 of training" in said["estimated"]
    assert said["last-adjustment"] == "step 2: 1 of 2 modules changed, total rank 8 -> 9"
    assert said["last-error"] == "1: error: process 0 died or hung"
    (commands / "queue").unlink()
    assert script("status").main([str(run)]) == 0
    assert "no job is running" in capsys.readouterr().out
