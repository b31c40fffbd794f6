"""The check of a machine's GPUs: refused without one, and as much of it as a CPU can, the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.gpu_check.checks import CHECKS, config_check
from launcher.gpu_check.outcome import CheckFailedError, Outcome, table
from launcher.gpu_check.setting import Setting, last_error
from tests.support.launch import ROOT
from tests.support.tiny import write_data, write_talking_model

SCRIPT = ROOT / "launcher" / "gpu_check.sh"
NOT_ON_A_CPU = {
    "FlashAttention": "neither flash-attn nor flash-attn-3 is installed",
    "planned memory": "on CPUs tests/planning/test_memory.py compares plans with real runs",
}


def run(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a GPU")
    done = run("--output", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("gpu_check: there is no GPU here") and "--device cpu" in sentence
    assert not (tmp_path / "out").exists()


def test_an_unknown_argument_is_refused() -> None:
    done = run("--gpus", "8")
    assert done.returncode == 2 and "unknown argument --gpus" in done.stderr


@pytest.mark.slow
def test_all_that_a_cpu_can_passes_in_two_processes(tmp_path: Path) -> None:
    model = write_talking_model(tmp_path / "model")
    data = write_data(tmp_path / "data.jsonl", longest=30)
    output = tmp_path / "checked"
    words = ["--device", "cpu", "--model", str(model), "--data", str(data), "--output", str(output)]
    done = run(*words, timeout=1500)
    found = {row["check"]: row for row in json.loads((output / "gpu_check.json").read_text())}
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert list(found) == list(CHECKS)
    skipped = {name: row["detail"] for name, row in found.items() if row["status"] == "skipped"}
    assert skipped == NOT_ON_A_CPU
    assert found["step time against PEFT"]["status"] == "measured"
    last = done.stdout.splitlines()[-1]
    assert last == f"{len(CHECKS) - 3} passed, 1 measured, 2 skipped"


def setting(folder: Path) -> Setting:
    return Setting("cpu", 2, folder, folder / "model", folder / "data.jsonl")


def write_losses(folder: Path, name: str, losses: list[float]) -> None:
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    changed = {"before": {"a": 1}, "after": {"a": 2}}
    (run / "ranks.jsonl").write_text(f"{json.dumps(changed)}\n" * 2)


def test_losses_that_differ_by_more_than_rounding_fail_with_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setting, "work", lambda *_, **__: None)
    for name, losses in (("zero3", [2.0, 1.0]), ("zero2", [2.0, 1.001]), ("zero2-resumed", [2.0, 1.001])):
        write_losses(tmp_path, name, losses)
    with pytest.raises(CheckFailedError, match=r"losses are off by 1.0e-03 from zero3, 1e-04 is allowed"):
        config_check("zero2")(setting(tmp_path))


def test_a_command_that_fails_is_reported_with_its_last_error(tmp_path: Path) -> None:
    code = "import sys; print('error: no such model', file=sys.stderr); print('bye'); sys.exit(2)"
    with pytest.raises(CheckFailedError, match=r"exit code 2: error: no such model \(see .*one.log\)"):
        setting(tmp_path).command("one", sys.executable, "-c", code)
    (tmp_path / "log").write_text("Traceback\n  here\nRuntimeError: NCCL is not there\n[W] noise\n")
    assert last_error(tmp_path / "log") == "RuntimeError: NCCL is not there"


def test_the_table_has_a_row_for_each_check_and_counts_them() -> None:
    rows = [Outcome("NF4", "passed", "fine", 3.2), Outcome("vLLM", "failed", "exit code 1", 61)]
    assert table(rows).splitlines() == [
        "NF4   passed       3 s  fine",
        "vLLM  failed      61 s  exit code 1",
        "1 passed, 1 failed",
    ]
