"""The benchmark of loading; tests/zero/test_loading.py has the bound on memory that it measures."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from tests.support.launch import start_processes, wait
from tests.support.recipes import write_recipe


def test_it_prints_the_share_the_largest_tensor_and_the_peak(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = ["-m", "dynrank_ds.bench", "load", "--quick", "--recipe", str(recipe)]
    processes = start_processes(2, command, tmp_path / "logs")
    wait(processes)
    assert [process.returncode for process in processes] == [0, 0], [p.output for p in processes]
    sizes = [weight.nbytes for weight in load_file(tmp_path / "model" / "model.safetensors").values()]
    printed = [" ".join(line.split()) for line in processes[0].output.splitlines()]
    assert f"load share of the base on this process {sum(sizes) / 2 / 2**20:.1f} MiB" in printed
    assert f"load largest tensor {max(sizes) / 2**20:.1f} MiB" in printed
    for what in ("host memory over imports, at most", "reading and adapting"):
        assert f"load       {what}" in processes[0].output
