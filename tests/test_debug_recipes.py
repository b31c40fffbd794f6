"""Every method's settings for LLaMA on a tiny model of each family, from the data to the merged model."""

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
from dynrank_ds.composing import read_recipe, shipped
from tests.support.launch import ROOT, train
from tests.support.recipes import lines

STEPS = 40
_OVERRIDES = ("train.epochs=null", f"train.steps={STEPS}", "data.limit=null")
_METHODS = shipped("methods")
_SLOW = ("adalora", "pe_dyra")
"""One on each family; the others take as long each, and are run with --soak."""


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
    "method",
    [pytest.param(m, marks=pytest.mark.slow if m in _SLOW else pytest.mark.soak) for m in _METHODS],
)
def test_a_debug_recipe_goes_from_data_to_a_merged_model(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes; half of the methods on each family and data set."""
    second = _METHODS.index(method) % 2 == 0
    family, data = ("llama3_debug", "codefeedback_python") if second else ("llama2_debug", "metamathqa")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["debug_model.py", family])
    runpy.run_path(str(ROOT / "launcher/debug_model.py"), run_name="__main__")
    assert (tmp_path / read_recipe(family)["model"]["path"] / "model.safetensors").is_file()
    fields, extra = (("query", "answer"), {"lang": "python"}) if second else (("query", "response"), {})
    write_rows(tmp_path / "rows.jsonl", fields, extra)

    name = f"{family}+{data}+{method}"
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
