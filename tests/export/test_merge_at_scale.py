"""Merging many files at once, killed half-way, and into another base than the adapter's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dynrank_ds.cli import main
from dynrank_ds.errors import ModelError
from dynrank_ds.export import merge_adapter
from dynrank_ds.export.base_model import model_hash

from .conftest import save_base


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, Path]:
    """A model with the names of LLaMA-2-70B, 80 layers in 15 and more files, and an adapter of PEFT's on it."""
    root = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = save_base(root / "base", torch.bfloat16, shard="20KB", num_hidden_layers=80, **sizes)
    assert len(list(base.glob("*.safetensors"))) >= 15
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear")
    )
    for module in model.modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    model.save_pretrained(root / "adapter")
    return base, root / "adapter"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "dynrank.json"}


def test_the_names_of_a_70b_model_merge_as_peft_merges_them_with_any_number_of_workers(large, tmp_path):
    base, adapter = large
    for workers in (1, 3):
        command = ["merge", "--adapter", str(adapter), "--base", str(base), "--workers", str(workers)]
        assert main([*command, "--output", str(tmp_path / f"merged{workers}")]) == 0
    assert files(tmp_path / "merged1") == files(tmp_path / "merged3")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    found = {
        k: v for path in (tmp_path / "merged1").glob("*.safetensors") for k, v in load_file(path).items()
    }
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # The sums are rounded to bf16 from fp32 sums of another order.
        assert torch.allclose(tensor.float(), expected[name], rtol=2**-8, atol=1e-6), name


def test_no_number_of_workers_below_one(large, tmp_path, capsys):
    command = ["merge", "--adapter", str(large[1]), "--base", str(large[0]), "--workers", "0"]
    assert main([*command, "--output", str(tmp_path / "merged")]) == 2
    assert "--workers is 0: give at least 1" in capsys.readouterr().err


SLOW_MERGE = """
import sys, time
from dynrank_ds.export.merging import Merge
whole = Merge.write_file
def slow(*arguments):
    time.sleep(0.3)
    return whole(*arguments)
Merge.write_file = slow
from dynrank_ds.cli import main
main(sys.argv[1:])
"""


def test_a_merge_killed_half_way_leaves_no_folder_and_starts_again(large, tmp_path):
    base, adapter = large
    words = ["merge", "--adapter", str(adapter), "--base", str(base), "--output", str(tmp_path / "merged")]
    process = subprocess.Popen([sys.executable, "-c", SLOW_MERGE, *words])
    staging = tmp_path / ".merged.tmp"
    deadline = time.monotonic() + 120
    while len(list(staging.glob("*.safetensors"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "merged").exists() and staging.exists()
    (staging / "model-00001-of-00099.safetensors").write_bytes(b"of the merge that was killed")
    assert main(words) == 0
    merge_adapter(adapter, str(base), tmp_path / "whole")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    assert not staging.exists()


def test_an_adapter_of_another_base_is_refused_unless_forced(large, tmp_path, capsys, caplog):
    base, _ = large
    adapter = shutil.copytree(large[1], tmp_path / "adapter")
    (adapter / "dynrank.json").write_text(json.dumps({"base_model_hash": model_hash(base)}))
    merge_adapter(adapter, str(base), tmp_path / "right")
    other = shutil.copytree(base, tmp_path / "other")
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    command = ["merge", "--adapter", str(adapter), "--base", str(other), "--output", str(tmp_path / "merged")]
    capsys.readouterr()
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "was trained on another base than" in err and "--force" in err and err.count("\n") == 1
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ModelError, match="their hashes differ"):
        merge_adapter(adapter, str(other), tmp_path / "merged")
    assert main([*command, "--force"]) == 0
    assert "their hashes differ" in caplog.text and (tmp_path / "merged/dynrank.json").is_file()
