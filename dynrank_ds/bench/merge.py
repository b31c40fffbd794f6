"""What merging costs beside copying the same files, on a made checkpoint with LLaMA-2-7B's shapes."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from dynrank_ds.bench.figures import Figure
from dynrank_ds.bench.memory import added_memory
from dynrank_ds.export import merge_adapter
from dynrank_ds.export.peft_adapter import factor_key
from dynrank_ds.export.peft_config import CONFIG, WEIGHTS
from dynrank_ds.files import sync
from dynrank_ds.recipe import Recipe
from dynrank_ds.tensorfile import TensorEntry, TensorFileWriter

MIB, RANK = 2**20, 16
_HIDDEN, _INTERMEDIATE, _VOCABULARY = 4096, 11008, 32000


def measure_merge(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield (what, figure) of merging and copying 3 GB (quick: 1.1 GB), in turns; the recipe plays no part."""
    with tempfile.TemporaryDirectory() as root:
        base, adapter = Path(root) / "base", Path(root) / "adapter"
        shapes = llama_shapes(layers=1 if quick else 6)
        write_base(base, shapes)
        write_adapter(adapter, shapes)
        size = sum(path.stat().st_size for path in base.iterdir())
        largest = max(2 * math.prod(shape) for shape in shapes.values())
        yield Figure("size of the base", f"{size / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB")
        copying: list[float] = []
        merging: dict[int, list[float]] = {1: [], 2: []}
        memory = 0
        for _ in range(2 if quick else 5):
            copying.append(_seconds(lambda: _copy(base, Path(root) / "copy"), Path(root) / "copy"))
            for workers, seconds in merging.items():
                work = _Measured(partial(merge_adapter, adapter, str(base), Path(root) / "out", workers))
                seconds.append(_seconds(work, Path(root) / "out"))
                memory = max(memory, work.memory) if workers == 1 else memory
        copied = statistics.median(copying)
        yield Figure("copying, until the disk has it", f"{copied:.2f} s, {size / MIB / copied:.0f} MiB/s")
        for workers, seconds in merging.items():
            ratios = [c / m for c, m in zip(copying, seconds, strict=True)]
            yield Figure(
                f"merging with {workers} worker{'s' * (workers > 1)}",
                f"{statistics.median(seconds):.2f} s, {statistics.median(ratios):.2f} x the speed of the copy "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
            )
        yield Figure(
            "memory with 1 worker, at most",
            f"{memory / MIB:.0f} MiB, {memory / largest:.2f} x the largest tensor",
        )


class _Measured:
    """A piece of work that notes the memory it took."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self.memory = work, 0

    def __call__(self) -> None:
        self.memory = added_memory(self._work)


def _seconds(work: Callable[[], object], output: Path) -> float:
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def _copy(base: Path, output: Path) -> None:
    output.mkdir()
    for path in base.iterdir():
        shutil.copyfile(path, output / path.name)
        sync(output / path.name)


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a LLaMA-2-7B with so many layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for kind in "qkvo":
            shapes[f"{layer}.self_attn.{kind}_proj.weight"] = (_HIDDEN, _HIDDEN)
        for kind in ("gate", "up"):
            shapes[f"{layer}.mlp.{kind}_proj.weight"] = (_INTERMEDIATE, _HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (_HIDDEN, _INTERMEDIATE)
    return shapes | {"lm_head.weight": (_VOCABULARY, _HIDDEN)}


def write_base(folder: Path, shapes: Mapping[str, tuple[int, ...]], shard_bytes: int = 10**9) -> None:
    """Write random bf16 weights in shards, with an index and an empty configuration."""
    folder.mkdir()
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and held + nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with TensorFileWriter(
            folder / file, [TensorEntry(n, torch.bfloat16, shapes[n]) for n in names]
        ) as out:
            for name in names:
                out.write(name, torch.randn(shapes[name], dtype=torch.bfloat16))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text("{}")


def write_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a random adapter of rank 16 on every projection."""
    folder.mkdir()
    sides = {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith("_proj.weight")}
    entries = [
        TensorEntry(factor_key(name, side), torch.float32, (RANK, n_in) if side == "A" else (n_out, RANK))
        for name, (n_out, n_in) in sides.items()
        for side in "AB"
    ]
    with TensorFileWriter(folder / WEIGHTS, entries) as out:
        for entry in entries:
            out.write(entry.name, torch.randn(entry.shape))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(sides)}
    (folder / CONFIG).write_text(json.dumps(config))
    os.sync()
