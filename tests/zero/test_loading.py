"""Under ZeRO-3 the base is read into each process's shards, and is the model that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.architectures import ARCHITECTURES, write_architecture
from tests.support.launch import outcomes, run_worker
from tests.support.sharded import write_sharded
from tests.support.tiny import write_data, write_model

STREAMED = ("LLaMA", "Qwen2.5, tied", "Gemma-2", "Gemma-3 (text)", "Phi-3", "GPT-NeoX", "Falcon-H1", "Cohere")
CONVERTED = ("Mixtral", "DeepSeek-V3")
"""Their experts are merged on loading."""


def write_recipe(folder: Path, **model: Any) -> str:
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "fp32", **model},
        "data": {"source": str(folder.parent / "data.jsonl")},
        "adapter": {"targets": "all-linear", "rank": 2},
        "method": {"name": "lora"},
        "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 1e-3},
        "output": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    write_data(folder / "data.jsonl", samples=2)
    names = []
    for name in (*STREAMED, *CONVERTED):
        write_architecture(folder / name / "model", *ARCHITECTURES[name])
        names.append(write_recipe(folder / name))
    # Stored in fp32, trained in bf16; and of no size that 3 divides.
    write_model(folder / "bf16" / "model", hidden=40)
    names.append(write_recipe(folder / "bf16", dtype="bf16"))
    run_worker(3, "loading", folder, *names)
    return folder


@pytest.mark.parametrize("name", [*STREAMED, "bf16"])
def test_a_streamed_base_is_bit_for_bit_what_transformers_loads(folder: Path, name: str) -> None:
    for process in outcomes(folder / name, "loaded", 3):
        assert process["parameters"] == process["buffers"] == []
        assert process["logits"] and process["finite"]


@pytest.mark.parametrize("name", [*STREAMED, "bf16"])
def test_nothing_is_sent_while_a_base_is_read_and_adapted(folder: Path, name: str) -> None:
    for process in outcomes(folder / name, "loaded", 3):
        assert process["collectives"] == []
        assert process["partitioned"] > 0 and process["saves no weights"]
        assert any("is read into ZeRO-3 shards" in line for line in process["said"])


@pytest.mark.parametrize("name", CONVERTED)
def test_a_checkpoint_that_is_converted_on_loading_is_loaded_whole_and_reported(
    folder: Path, name: str
) -> None:
    for process in outcomes(folder / name, "loaded", 3):
        assert process["partitioned"] == 0
        assert len(process["said"]) == 1 and "is converted on loading" in process["said"][0]
        assert process["parameters"] == process["buffers"] == [] and process["logits"]


def write_large(folder: Path, hidden: int, layers: int, dtype: torch.dtype, **model: Any) -> dict[str, int]:
    """A LLaMA in four files with its recipe; returns the bytes of its tensors."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8000,
    )
    sizes = write_sharded(folder / "model", config, dtype, files=4)
    write_recipe(folder, dtype="bf16" if dtype == torch.bfloat16 else "fp32", **model)
    return sizes


SMALL = (768, 12, torch.float32)
# 1.03 B parameters, 2.1 GB.
LARGE = pytest.param(2048, 28, torch.bfloat16, marks=pytest.mark.slow)


@pytest.mark.parametrize(("hidden", "layers", "dtype"), [SMALL, LARGE])
def test_a_process_holds_its_share_the_largest_tensor_and_a_tenth_more_at_most(
    tmp_path: Path, hidden: int, layers: int, dtype: torch.dtype
) -> None:
    sizes = write_large(tmp_path, hidden, layers, dtype)
    for cost in costs_of_loading(tmp_path):
        assert cost["share"] == sum(sizes.values()) / 2
        assert cost["bound"] == pytest.approx(1.1 * (cost["share"] + max(sizes.values())))
        assert cost["peak"] <= cost["bound"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 19).view(2, 8)).logits
    assert expected.std() > 0
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"logits-{rank}.pt", weights_only=True), expected)


@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("hidden", "layers", "dtype"), [(896, 10, torch.float32), LARGE])
def test_in_nf4_a_process_holds_its_packed_share_constants_the_largest_tensor_and_a_tenth_more_at_most(
    tmp_path: Path, hidden: int, layers: int, dtype: torch.dtype, double: bool
) -> None:
    sizes = write_large(tmp_path, hidden, layers, dtype, quantisation="nf4", double_quantisation=double)
    packed = {name for name in sizes if name.endswith("_proj.weight")}
    weights = sum(sizes[name] for name in packed) // dtype.itemsize
    others = sum(size for name, size in sizes.items() if name not in packed)
    scales = sum(sizes[name] // dtype.itemsize // 64 for name in packed)
    constants = sum(-(-sizes[name] // dtype.itemsize // 64 // 256) * 4 for name in packed) + scales
    for cost in costs_of_loading(tmp_path):
        assert cost["share"] == (weights / 2 + others) / 2 + (constants if double else 4 * scales)
        largest = max(size for name, size in sizes.items() if name not in packed)
        assert cost["bound"] == pytest.approx(1.1 * (cost["share"] + largest))
        assert cost["peak"] <= cost["bound"]


def costs_of_loading(folder: Path) -> list[dict[str, float]]:
    run_worker(2, "load_memory", folder)
    costs: list[dict[str, float]] = outcomes(folder, "cost", 2)
    for cost, engine in zip(costs, outcomes(folder, "engine", 2), strict=True):
        print({name: round(value / 2**20, 1) for name, value in cost.items()}, "MiB; engine", engine / 2**20)
    return costs
