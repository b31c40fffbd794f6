"""The benchmark of one adapted layer, and the paired ratio that it states."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from dynrank_ds.bench.linear import _adapted, _pefts
from dynrank_ds.bench.pairs import paired_ratio
from tests.support.launch import start_processes, wait
from tests.support.recipes import write_recipe


def test_the_ratio_is_that_of_the_two_times() -> None:
    found = paired_ratio(lambda: time.sleep(0.04), lambda: time.sleep(0.08), 6, torch.device("cpu"))
    assert 0.4 < found.median < 0.7


def test_both_adapted_layers_compute_the_same() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(24, 40, bias=False).requires_grad_(False)
    ours, theirs = _adapted(base, 4), _pefts(base, 4)
    with torch.no_grad():
        b = torch.randn(40, 4)
        ours.lora_B.copy_(b.T)
        theirs.lora_B["default"].weight.copy_(b)
        ours.lora_A.copy_(theirs.lora_A["default"].weight)
    x = torch.randn(1, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == 4 * (24 + 40)


def test_it_writes_a_ratio_by_each_peer(tmp_path: Path) -> None:
    command = ["-m", "dynrank_ds.bench", "linear", "--quick", "--recipe", str(write_recipe(tmp_path))]
    [process] = start_processes(1, [*command, "--json", str(tmp_path / "linear.json")], tmp_path / "logs")
    wait([process])
    assert process.returncode == 0, process.output
    figures = json.loads((tmp_path / "linear.json").read_text())["benchmarks"]["linear"]
    fp32 = [figure["values"] for figure in figures if figure["values"]["dtype"] == "float32"]
    assert [values["peer"] for values in fp32] == ["bare linear", "peft lora"]
    for values in fp32:
        low, high = values["interval_95"]
        assert 0 < low <= values["ratio"] <= high
