"""What writes a folder, where the disk has no room: one sentence, exit code 2, nothing left behind."""

import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynrank_ds.export import export_adapter

LIMIT = 4096


def limit_files() -> None:
    """Make writing beyond some bytes of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


@pytest.mark.parametrize("command", ["export", "resize", "merge"])
def test_a_full_disk_is_one_sentence(command, run, tmp_path):
    adapter = tmp_path / "adapter"
    export_adapter(run.folder, adapter)
    sources = {
        "export": ["--run", str(run.folder)],
        "resize": ["--adapter", str(adapter), "--rank", "1"],
        "merge": ["--adapter", str(adapter), "--base", str(run.base)],
    }
    before = sorted(tmp_path.iterdir())
    words = [sys.executable, "-m", "dynrank_ds.cli", command, *sources[command], "--output"]
    done = subprocess.run(
        [*words, str(tmp_path / "out")], capture_output=True, text=True, preexec_fn=limit_files
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["resize", "merge"])
@pytest.mark.parametrize("damage", ["cut", "nan", "ia3"])
def test_a_damaged_adapter_is_one_sentence(damage, command, run, tmp_path):
    from dynrank_ds.cli import main

    adapter = tmp_path / "adapter"
    export_adapter(run.folder, adapter)
    weights = adapter / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "nan":
        stored = load_file(weights)
        stored[next(iter(stored))][0, 0] = torch.nan
        save_file(stored, weights)
    else:
        config = adapter / "adapter_config.json"
        config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    options = ["--rank", "1"] if command == "resize" else ["--base", str(run.base)]
    assert main([command, "--adapter", str(adapter), "--output", str(tmp_path / "out"), *options]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
