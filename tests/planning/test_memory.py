"""The planned memory is that of real runs, and its parts follow from the recipe as they should."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

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
    "100,000 tokens": (256, 704, 4, 4, 100_000),
}
PROMPT, ANSWER = 40, 96
"""Tokens of every sample."""
# Little is gathered ahead and nothing kept, as of a model of tens of gigabytes.
SMALL_BUFFERS = {"stage3_max_reuse_distance": 2_000_000, "stage3_prefetch_bucket_size": 1_000_000}


def write_run(
    folder: Path, size: str, world_size: int, micro_batch_size: int, kind: str = "zero3", **model: Any
) -> Path:
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
    zero = load_config(kind, bf16=False)
    zero["zero_optimization"] |= SMALL_BUFFERS
    if kind == "zero3_hpz":
        zero["zero_optimization"]["zero_hpz_partition_size"] = 2
    (folder / "zero3.json").write_text(json.dumps(zero))
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "fp32", **model},
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


def peak(
    folder: Path, size: str, world_size: int, micro_batch_size: int, kind: str = "zero3", **model: Any
) -> int:
    """Bytes that the first process of a run held at most."""
    recipe = write_run(folder, size, world_size, micro_batch_size, kind, **model)
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


@cache
def peak_without_a_model_in_nf4(root: Path, world_size: int) -> int:
    """As `peak_without_a_model`, with bitsandbytes."""
    folder = root / f"tiny-nf4-{world_size}"
    folder.mkdir()
    return peak(folder, "tiny", world_size, 1, quantisation="nf4")


def planned(recipe: Recipe, world_size: int) -> Parts:
    zero = load_config(recipe.deepspeed.config, bf16=False)["zero_optimization"]
    architecture = describe(recipe)
    size = recipe.train.micro_batch_size
    batch = MicroBatch(size, PROMPT + ANSWER, size * ANSWER)
    return memory(
        recipe, architecture, zero, world_size, batch, architecture.trainable_parameters, 0, on_cpu=True
    ).parts


RUNS = [
    (size, world_size, samples)
    for size in ("62M", "96M", "164M")
    for world_size in (1, 2)
    for samples in (1, 4)
]
ALWAYS = [("62M", 1, 1), ("62M", 2, 1)]


@pytest.mark.parametrize(
    ("size", "world_size", "micro_batch_size"),
    [run if run in ALWAYS else pytest.param(*run, marks=pytest.mark.slow) for run in RUNS],
)
def test_planned_memory_is_within_a_tenth_of_a_real_runs_peak(
    size: str,
    world_size: int,
    micro_batch_size: int,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    without = peak_without_a_model(tmp_path_factory.getbasetemp(), world_size)
    measured = peak(tmp_path, size, world_size, micro_batch_size) - without
    compare(tmp_path, world_size, measured)


def compare(folder: Path, world_size: int, measured: int) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"))
    parts = planned(recipe, world_size)
    print(f"{world_size} x {recipe.train.micro_batch_size}: {parts.total / 2**20:.0f} MiB planned,", end=" ")
    print(f"{measured / 2**20:.0f} MiB measured, {parts.total / measured:.3f}; {parts}")
    assert parts.total == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_logits_of_a_large_vocabulary_take_what_a_chunk_of_them_takes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """768 targets of 100,000 tokens: all at once would be 879 MiB of the largest three tensors, a chunk is 383."""
    without = peak_without_a_model(tmp_path_factory.getbasetemp(), 2)
    compare(tmp_path, 2, peak(tmp_path, "100,000 tokens", 2, 8) - without)
    parts = planned(load_recipe(str(tmp_path / "recipe.yaml")), 2)
    assert 0.5 * parts.total < parts.logits < 0.6 * 12 * 768 * 100_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero3_offload", "zero3_offload_params", "zero3_hpz"])
def test_planned_memory_is_that_of_real_runs_with_offload_and_hpz(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On a CPU what is offloaded lies in the same memory."""
    world_size = 4 if kind == "zero3_hpz" else 2
    without = peak_without_a_model(tmp_path_factory.getbasetemp(), world_size)
    compare(tmp_path, world_size, peak(tmp_path, "164M", world_size, 1, kind) - without)


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_planned_memory_is_that_of_real_runs_in_nf4(
    double: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    without = peak_without_a_model_in_nf4(tmp_path_factory.getbasetemp(), 2)
    nf4 = {"quantisation": "nf4", "double_quantisation": double}
    compare(tmp_path, 2, peak(tmp_path, "164M", 2, 4, **nf4) - without)
