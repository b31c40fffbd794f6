"""The training script's command line; training itself is tested with several processes elsewhere."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from dynrank_ds.errors import MachineError, RecipeError
from dynrank_ds.training.signals import StopRequest
from tests.support.launch import ROOT, free_port, launcher_script

SCRIPT = ROOT / "launcher" / "train.py"


@pytest.fixture
def script() -> ModuleType:
    return launcher_script("train.py")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe", "r.yaml", "train.steps=3", "output.dir=x"],
        ["train.steps=3", "output.dir=x", "--recipe", "r.yaml"],
        ["--local_rank=0", "train.steps=3", "--recipe", "r.yaml", "output.dir=x"],
        ["resume=auto", "train.steps=3", "--recipe", "r.yaml", "output.dir=x"],
    ],
)
def test_overrides_stand_before_or_after_the_recipe(
    arguments: list[str],
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(name: str, overrides: Sequence[str]) -> None:
        raise RecipeError(f"{name} {' '.join(overrides)}")

    monkeypatch.setattr(script, "load_recipe", load)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert script.main(StopRequest()) == 2
    assert capsys.readouterr().err == "error: r.yaml train.steps=3 output.dir=x\n"


def test_deepspeed_logs_errors_only() -> None:
    code = (
        "import logging; from dynrank_ds.zero import processes; processes.start(60); "
        "log = logging.getLogger('DeepSpeed'); log.warning('an untested optimizer'); log.error('a failure')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "a failure" in ran.stdout + ran.stderr
    assert "untested" not in ran.stdout + ran.stderr and "INFO" not in ran.stdout + ran.stderr


def test_resume_is_auto_or_never(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "quickstart", "resume=yes"])
    assert script.main(StopRequest()) == 2
    assert capsys.readouterr().err == "error: resume is 'yes': give auto or never\n"


def test_only_the_first_process_reports_a_mistake(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "nowhere"])
    assert script.main(StopRequest()) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert script.main(StopRequest()) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_one_machine_lacks_is_reported_by_whichever_process_sees_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise MachineError("the cache folder is full")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(script, "_train", full)
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "quickstart", "output.dir=x"])
    assert script.main(StopRequest()) == 2
    assert capsys.readouterr().err == "error: the cache folder is full\n"


def test_help_shows_an_example(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main(StopRequest())
    assert stop.value.code == 0
    assert "example: deepspeed" in capsys.readouterr().out


LAUNCHER = """
import subprocess, sys
script = "from dynrank_ds.training.last_line import print_error; print_error('a mistake')"
subprocess.run([sys.executable, "-c", script])
sys.stderr.write("the launcher's own line\\n")
"""


@pytest.mark.parametrize("launched", [True, False])
def test_an_error_is_the_last_line_after_those_of_the_launcher(launched: bool) -> None:
    variables = {"TORCHELASTIC_RUN_ID": "1"} if launched else {}
    ran = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    expected = ["error: a mistake", "the launcher's own line"] + ["error: a mistake"] * launched
    assert ran.stderr.splitlines() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("-m", "torch.distributed.run", "--nproc_per_node", "2"),
        ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2"),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_a_mistake_is_the_last_line_under_the_launchers_as_they_are(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    command = [sys.executable, *launcher, "--master_port", free_port(), str(SCRIPT), "--recipe", "quickstart"]
    ran = subprocess.run(
        [*command, "train.stepz=3"],
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    lines = ran.stdout.splitlines()
    mistake = "error: quickstart: unknown key 'train.stepz': did you mean 'steps'?"
    assert ran.returncode != 0 and lines[-1] == mistake and lines.count(mistake) == 2, ran.stdout


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--recipe", "quickstart", "output.dir=run", *overrides],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_mistake_in_the_recipe_ends_the_command_before_anything_is_made(tmp_path: Path) -> None:
    done = run(tmp_path, "train.stepz=3")
    assert done.returncode == 2
    assert done.stderr == "error: quickstart: unknown key 'train.stepz': did you mean 'steps'?\n"
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_a_mistake_found_after_the_processes_have_met_makes_nothing_either(tmp_path: Path) -> None:
    done = run(tmp_path, f"model.path={tmp_path}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: model.path {tmp_path} has no config.json: give the folder of a Hugging Face model"
    ]
    assert not list(tmp_path.iterdir())
