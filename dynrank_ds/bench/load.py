"""What loading the base takes, in time and memory, on each process of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynrank_ds.bench.figures import Figure
from dynrank_ds.bench.memory import added_memory
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.dtype import agree_on_dtype
from dynrank_ds.training.model import DTYPES, adapt, load_model
from dynrank_ds.training.quantisation import constant_bytes
from dynrank_ds.zero import processes
from dynrank_ds.zero.config import complete_config, load_config
from dynrank_ds.zero.partitioner import make_partitioner

MIB = 2**20


@dataclass(frozen=True)
class LoadCost:
    """Bytes and seconds of one process."""

    share: int
    """Of the base, that it holds afterwards, wherever that lies; with all of its quantisation constants."""
    largest: int
    """Of the whole tensor with most elements."""
    peak: int
    """Host memory beyond what the program and its libraries held before, at most, adapters included."""
    seconds: float

    @property
    def bound(self) -> float:
        """What a process that reads tensor by tensor may hold: its share, the largest tensor and 10 %."""
        return 1.1 * (self.share + self.largest)


def measure_load(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield (what, figure) of the first process's loading of the recipe's base, which `quick` does not shorten."""
    device = processes.start(recipe.deepspeed.timeout)
    recipe = agree_on_dtype(recipe, None, device)
    cost = load_cost(recipe, device)
    on_device = processes.peak_memory_gib() if device.type != "cpu" else None
    processes.stop()
    yield Figure("share of the base on this process", f"{cost.share / MIB:.1f} MiB")
    yield Figure("largest tensor", f"{cost.largest / MIB:.1f} MiB")
    yield Figure("host memory over imports, at most", f"{cost.peak / MIB:.1f} MiB")
    if on_device is not None:
        yield Figure("device memory, at most", f"{on_device * 1024:.1f} MiB")
    yield Figure("reading and adapting", f"{cost.seconds:.2f} s")


def load_cost(recipe: Recipe, device: torch.device | None = None) -> LoadCost:
    """Load the base and put the adapter into it, as a run does; every process must call it."""
    bf16 = recipe.triples_in_bf16
    config = complete_config(load_config(recipe.deepspeed.config, bf16), 1, 1, 1.0, bf16)
    _import_everything(recipe.model.path, recipe.model.quantisation is not None)
    shares: list[int] = []
    largest: list[int] = []

    def load() -> None:
        partitioner = make_partitioner(config, DTYPES[recipe.model.dtype])
        model = load_model(recipe.model, False, partitioner, device)
        base = list(model.parameters())
        constants = constant_bytes(model) if recipe.model.quantisation else 0
        shares.append(sum(getattr(p, "ds_tensor", p).nbytes for p in base) + constants)
        largest.append(max(getattr(p, "ds_numel", p.numel()) * p.dtype.itemsize for p in base))
        adapt(model, recipe)

    started = time.perf_counter()
    peak = added_memory(load)
    return LoadCost(shares[0], largest[0], peak, time.perf_counter() - started)


def _import_everything(path: str, quantised: bool) -> None:
    """Import the code of the model's class, which is no part of the model."""
    config = AutoConfig.from_pretrained(path)
    import_module(AutoModelForCausalLM._model_mapping[type(config)].__module__)
    if quantised:
        import_module("dynrank_ds.zero.nf4")
