"""Several engines at a time give what one gives: the same bytes in the same order."""

import subprocess
import sys
from pathlib import Path

import pytest

from dynrank_eval.cli import main
from tests.support.scoring import samples, write_rows


def arguments(model: Path, data: Path, engine: str, length: str) -> list[str]:
    asked = [
        "generate",
        "--model",
        str(model),
        "--engine",
        engine,
        "--dtype",
        "fp32",
        "--max-new-tokens",
        length,
    ]
    return [*asked, "--task", "gsm_symbolic", "--data-dir", str(data)]


def test_two_engines_give_the_bytes_of_one(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    for name, engines in (("one", "1"), ("two", "2")):
        asked = [*arguments(tiny_model, data, "hf", "6"), "--engines", engines]
        assert main([*asked, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "one/samples.jsonl").read_bytes() == (tmp_path / "two/samples.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_two_vllm_engines_give_the_bytes_of_one(drawn: bool, tiny_model: Path, tmp_path: Path) -> None:
    """On a CPU, each in a process of its own; prompts of unequal length, three draws each."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    rows = [
        {"task_id": str(n), "question": f"{n} + 1?" * (1 + n % 5), "answer": str(n + 1)} for n in range(30)
    ]
    write_rows(tmp_path / "gsm_symbolic.jsonl", rows)
    asked = arguments(tiny_model, tmp_path, "vllm", "24")
    asked += ["--n", "3", "--temperature", "0.8", "--top-p", "0.9"] if drawn else []
    for name, engines in (("one", "1"), ("two", "2")):
        command = [sys.executable, "-m", "dynrank_eval.cli", *asked, "--engines", engines]
        done = subprocess.run([*command, "--output", str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "one/samples.jsonl").read_bytes() == (tmp_path / "two/samples.jsonl").read_bytes()
    texts = [row["completion"] for row in samples(tmp_path / "one")]
    assert len(texts) == (90 if drawn else 30) and len(set(texts)) > 10
