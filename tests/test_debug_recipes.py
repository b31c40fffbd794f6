"""Every method's settings for LLaMA on a tiny model of each family, from the data to scores of the merged model."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynrank_ds.cli
import dynrank_eval.cli
from dynrank_ds.composing import read_recipe, shipped
from tests.support.benchmarks import PROBLEMS, write_benchmarks
from tests.support.launch import ROOT, train
from tests.support.recipes import lines
from tests.support.scoring import results

STEPS = 40
BENCHMARKS = ("gsm8k", "math", "humaneval", "mbpp")
_OVERRIDES = ("train.epochs=null", f"train.steps={STEPS}", "data.limit=null")
_FAMILIES = ("llama2_debug+metamathqa", "llama3_debug+codefeedback_python")
_RUNS = [f"{_FAMILIES[i % 2]}+{method}" for i, method in enumerate(shipped("methods"), start=1)]
_IN_NF4 = "llama3_debug+nf4+codefeedback_python+pe_dyra"
_SLOW = ("llama3_debug+codefeedback_python+adalora", "llama2_debug+metamathqa+pe_dyra", _IN_NF4)
"""Both families, and a base in 4 bits; the others take as long each, and are run with --soak."""


def write_rows(path: Path, fields: tuple[str, str], extra: dict[str, str]) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(60):
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        rows.append({fields[0]: f"What is {a} + {b}?", fields[1]: f"The sum is {a + b}.", **extra})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokens_and_logits(model: Path, adapter: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one prompt, by transformers alone, with PEFT's adapter where one is given."""
    ids = AutoTokenizer.from_pretrained(model)("What is 1 + 2?", return_tensors="pt")["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        return ids, loaded(ids).logits


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in _SLOW else pytest.mark.soak) for n in [*_RUNS, _IN_NF4]],
)
def test_a_debug_recipe_goes_from_data_to_scores_on_all_benchmarks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes; half of the methods on each family and data set."""
    family, *_, method = name.split("+")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["debug_model.py", family])
    runpy.run_path(str(ROOT / "launcher/debug_model.py"), run_name="__main__")
    assert (tmp_path / read_recipe(family)["model"]["path"] / "model.safetensors").is_file()
    of_code = "codefeedback_python" in name
    fields, extra = (("query", "answer"), {"lang": "python"}) if of_code else (("query", "response"), {})
    write_rows(tmp_path / "rows.jsonl", fields, extra)

    overrides = [*_OVERRIDES, "data.source=rows.jsonl", "model.dtype=fp32"]
    assert dynrank_ds.cli.main(["validate", "--recipe", name, *overrides]) == 0
    assert dynrank_ds.cli.main(["prepare", "--recipe", name, *overrides]) == 0
    train(2, Path(name), *overrides)
    run = tmp_path / "runs" / name.replace("+", "_")
    metrics = lines(run / "metrics.jsonl")
    assert len(metrics) == STEPS and metrics[-1]["loss"] < metrics[0]["loss"]
    if method not in ("lora", "rslora", "lora_plus"):
        changed = [line for line in lines(run / "ranks.jsonl") if line["before"] != line["after"]]
        assert changed

    assert dynrank_ds.cli.main(["export", "--run", str(run), "--output", "adapter"]) == 0
    assert dynrank_ds.cli.main(["merge", "--adapter", "adapter", "--output", "merged"]) == 0
    base = tmp_path / read_recipe(family)["model"]["path"]
    ids, by_peft = tokens_and_logits(base, tmp_path / "adapter")
    again, by_merged = tokens_and_logits(tmp_path / "merged")
    assert torch.equal(ids, again) and torch.allclose(by_peft, by_merged, atol=1e-4)
    assert not torch.allclose(tokens_and_logits(base)[1], by_merged, atol=1e-3)

    problems = write_benchmarks(tmp_path / "problems")
    words = ["run", "--model", "merged", "--engine", "hf", "--dtype", "float32", "--max-new-tokens", "16"]
    tasks = ["--task", ",".join(BENCHMARKS), "--data-dir", str(problems), "--output", "scores"]
    assert dynrank_eval.cli.main([*words, *tasks]) == 0
    scored = results(tmp_path / "scores")["tasks"]
    assert {task: scored[task]["n"] for task in BENCHMARKS} == dict.fromkeys(BENCHMARKS, PROBLEMS)
