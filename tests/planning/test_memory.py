"""The planned memory is that of real runs, and its parts follow from the recipe as they should."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dynrank_ds.planning.activations import MicroBatch
from dynrank_ds.planning.architecture import describe
from dynrank_ds.planning.memory import Parts, memory
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.zero.config import load_config
from tests.support.launch import start_processes, wait
from tests.support.tiny import WORDS, write_tokenizer

# hidden, intermediate, layers, heads, vocabulary
SIZES = {
    "tiny": (64, 96, 2, 4, 200),
    "62M": (640, 1728, 10, 10, 4000),
    "96M": (768, 2048, 12, 12, 8000),
    "164M": (1024, 2816, 12, 16, 8000),
}
PROMPT, ANSWER = 40, 96
"""Tokens of every sample."""
# Little is gathered ahead and nothing kept, as of a model of tens of gigabytes.
SMALL_BUFFERS = {"stage3_max_reuse_distance": 2_000_000, "stage3_prefetch_bucket_size": 1_000_000}


def write_run(folder: Path, size: str, world_size: int, micro_batch_size: int) -> Path:
    """A recipe of two steps with two micro-batches each, its model and its data of samples of one length."""
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    draw = random.Random(0)
    rows = [
        {"query": " ".join(draw.choices(WORDS, k=8)), "response": " ".join(draw.choices(WORDS, k=ANSWER - 1))}
        for _ in range(16)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    zero = load_config("zero3", bf16=False)
    zero["zero_optimization"] |= SMALL_BUFFERS
    (folder / "zero3.json").write_text(json.dumps(zero))
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": str(folder / "data.jsonl"), "max_length": PROMPT + ANSWER},
        "adapter": {"rank": 8},
        "method": {"name": "lora"},
        "train": {
            "steps": 2,
            "global_batch_size": 2 * world_size * micro_batch_size,
            "micro_batch_size": micro_batch_size,
            "learning_rate": 1e-3,
            "activation_checkpointing": True,
        },
        "deepspeed": {"config": str(folder / "zero3.json")},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def peak(folder: Path, size: str, world_size: int, micro_batch_size: int) -> int:
    """Bytes that the first process of a run held at most."""
    recipe = write_run(folder, size, world_size, micro_batch_size)
    command = ["-m", "tests.planning.peak_worker", str(recipe), str(folder)]
    processes = start_processes(world_size, command, folder / "logs")
    wait(processes, timeout=580)
    assert all(process.returncode == 0 for process in processes), processes[0].output[-4000:]
    return int(json.loads((folder / "peak-0.json").read_text()))


@cache
def peak_without_a_model(root: Path, world_size: int) -> int:
    """Bytes of the same program with a model of almost nothing: the interpreter, libraries, gloo."""
    folder = root / f"tiny-{world_size}"
    folder.mkdir()
    return peak(folder, "tiny", world_size, 1)


def planned(recipe: Recipe, world_size: int) -> Parts:
    zero = load_config(recipe.deepspeed.config, bf16=False)["zero_optimization"]
    architecture = describe(recipe)
    size = recipe.train.micro_batch_size
    batch = MicroBatch(size, PROMPT + ANSWER, size * ANSWER)
    return memory(
        recipe, architecture, zero, world_size, batch, architecture.trainable_parameters, 0, on_cpu=True
    ).parts


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("size", ["62M", "96M", "164M"])
def test_planned_memory_is_within_a_tenth_of_a_real_runs_peak(
    size: str,
    world_size: int,
    micro_batch_size: int,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    without = peak_without_a_model(tmp_path_factory.getbasetemp(), world_size)
    measured = peak(tmp_path, size, world_size, micro_batch_size) - without
    parts = planned(load_recipe(str(tmp_path / "recipe.yaml")), world_size)
    print(f"{size} x {world_size} x {micro_batch_size}: {parts.total / 2**20:.0f} MiB planned,", end=" ")
    print(f"{measured / 2**20:.0f} MiB measured, {parts.total / measured:.3f}; {parts}")
    assert parts.total == pytest.approx(measured, rel=0.1)
