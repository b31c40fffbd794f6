"""Step time, tokens per second and peak memory of ours against PEFT's LoRA and AdaLoRA, doing the same work.

Every ratio is ours by theirs, of times taken pair by pair in one run: below 1 is faster or smaller.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dynrank_ds.bench.contenders import Arrays, Ours, Peft, PeftAlone, PeftDeepSpeed, PeftTrainer
from dynrank_ds.bench.figures import Figure, median_interval
from dynrank_ds.bench.models import TREND, describe, write_random
from dynrank_ds.bench.sides import Contender, Side, SideFailedError, Step
from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.data.collating import PaddedCollator
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import METHODS
from dynrank_ds.methods.weightlora import WeightLoRAConfig, WeightLoRAPlusConfig
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.recipe_sections import LLAMA_LINEARS
from dynrank_ds.training.attention import with_attention
from dynrank_ds.training.samples import prepare_data

STEPS = 130
"""Of the schedules of the methods; those of the quickstart recipes are made for so many."""
QUICKSTART_LINEARS = 210
QUICK_METHODS = ("lora", "pe_dyra", "adalora")
WARM_UP = 3
"""Steps before the first that is timed: in the first two DeepSpeed records what it fetches when."""


@dataclass(frozen=True)
class Setup:
    """How many processes, and the peers' loop in them."""

    name: str
    world_size: int
    loop: type[Peft]


ALONE = Setup("alone", 1, PeftAlone)
ZERO = Setup("deepspeed", 2, PeftDeepSpeed)
TRAINER = Setup("trainer", 2, PeftTrainer)


def measure_peers(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield every method on the recipe's model, in 10 pairs of steps, and what each side holds of memory.

    Quick: LoRA, PE-DyRA and AdaLoRA in 6 pairs of steps, and the memory of LoRA in one process.

    Of the recipe are taken model, data, train and deepspeed; adapter and method are those of the shipped quickstart
    recipe of each method. Learning rate and ranks stand still, dtype is fp32 unless the recipe says bf16.

    Raises:
        RecipeError: the benchmark was started in several processes, or data.packing is on, which PEFT's loops lack.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(recipe, 6 if quick else 10, Path(folder))
        for setup in (ALONE, ZERO):
            yield from bench.compare(setup, QUICK_METHODS if quick else tuple(METHODS))
        yield bench.row(TRAINER, "lora", "lora")
        if quick:
            yield bench.memory(ALONE, "lora", "lora")
            return
        for setup in (ALONE, ZERO):
            for method in METHODS:
                yield bench.memory(setup, method, "lora")
        yield bench.memory(ALONE, "adalora", "adalora")
        yield bench.memory(TRAINER, "lora", "lora")


def measure_trend(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield LoRA against PEFT's on random LLaMAs of two other sizes; otherwise as `measure_peers`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in TREND.items():
            path = write_random(recipe.model.path, shape, Path(folder) / name)
            model = recipe.model.model_copy(update={"path": str(path)})
            scratch = Path(folder) / f"{name}-runs"
            scratch.mkdir()
            bench = _Bench(recipe.model_copy(update={"model": model}), 6 if quick else 10, scratch)
            for setup in (ALONE, ZERO):
                yield bench.row(setup, "lora", "lora")
                yield bench.memory(setup, "lora", "lora")


class _Bench:
    """Comparisons on one model and one batch."""

    def __init__(self, recipe: Recipe, pairs: int, folder: Path) -> None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RecipeError("the benchmark peers starts its own processes: start it in one")
        if recipe.data.packing:
            raise RecipeError("data.packing is true: the benchmark peers compares padded batches, give false")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        sections: dict[str, Any] = {
            "data": recipe.data.model_copy(update={"held_out": 0}),
            "train": recipe.train.model_copy(
                update={
                    "steps": STEPS,
                    "epochs": None,
                    "schedule": "constant",
                    "warmup": 0,
                    "held_out_interval": None,
                }
            ),
        }
        dtype = "fp32" if recipe.model.dtype == "auto" else recipe.model.dtype
        self._recipe = with_attention(
            recipe.model_copy(update=sections).with_dtype(dtype), torch.device("cpu")
        )
        self._pairs, self._folder = pairs, folder
        dataset, pad_id = prepare_data(self._recipe)
        train = self._recipe.train
        self._dataset, self._collator = dataset, PaddedCollator(pad_id)
        self._indices = GlobalBatches(len(dataset), train.global_batch_size, train.seed).indices(0)
        self._about: dict[str, Any] = {
            "model": describe(recipe.model.path),
            "dtype": dtype,
            "attention": self._recipe.model.attention,
            "deepspeed_config": recipe.deepspeed.config,
            "global_batch_size": train.global_batch_size,
            "micro_batch_size": train.micro_batch_size,
            "tokens": int(dataset.lengths[self._indices].sum()),
            "targets": int(dataset.target_counts[self._indices].sum()),
        }
        self._runs = 0
        self._peaks: dict[tuple[str, str], int] = {}

    # --- rows

    def compare(self, setup: Setup, methods: Sequence[str]) -> Iterator[Figure]:
        """Yield our methods, each against PEFT's LoRA, which keeps running; and our AdaLoRA against PEFT's."""
        with ExitStack() as up:
            theirs = self._started(self._peft(setup, "lora"), setup, up)
            for method in methods:
                yield self._row(setup, self._ours(method), theirs)
        yield self.row(setup, "adalora", "adalora")

    def row(self, setup: Setup, method: str, peer: str) -> Figure:
        """Return the times of one of our methods against one of PEFT's."""
        with ExitStack() as up:
            try:
                theirs = self._started(self._peft(setup, peer), setup, up)
            except SideFailedError as error:
                name = f"peft {peer}, {setup.name}"
                return Figure(
                    name, f"crashes: {error}", {"setup": setup.name, "peer": peer, "crash": str(error)}
                )
            return self._row(setup, self._ours(method), theirs)

    def memory(self, setup: Setup, method: str, peer: str) -> Figure:
        """Return the largest peak of a process on either side, each measured in processes of its own."""
        ours, theirs = self._peak(setup, self._ours(method)), self._peak(setup, self._peft(setup, peer))
        values = {
            "kind": "memory",
            "setup": setup.name,
            "ours": method,
            "peer": f"peft {peer}",
            "ratio": ours / theirs,
            "peak_bytes": [ours, theirs],
            **self._about,
        }
        text = f"{ours / theirs:.3f}  ({ours / 2**30:.2f} and {theirs / 2**30:.2f} GiB)"
        return Figure(f"memory, {setup.name}: {method} / peft {peer}", text, values)

    # --- sides

    def _ours(self, method: str) -> Ours:
        self._runs += 1
        output = self._recipe.output.model_copy(update={"dir": str(self._folder / f"run-{self._runs}")})
        return Ours(
            f"ours {method}", _with_method(self._recipe, method).model_copy(update={"output": output})
        )

    def _peft(self, setup: Setup, method: str) -> Peft:
        recipe = _with_method(self._recipe, method)
        return setup.loop(
            f"peft {method}", recipe, self._micro_batches(setup.world_size), self._about["targets"]
        )

    def _micro_batches(self, world_size: int) -> tuple[tuple[Arrays, ...], ...]:
        """Return the micro-batches of each process, as our loop computes them."""
        size = self._recipe.train.micro_batch_size
        self._recipe.accumulation(world_size)

        def of(rank: int) -> Iterator[Arrays]:
            for chosen in self._collator.micro_batches(
                self._indices, self._dataset.lengths, rank, world_size, size
            ):
                batch = self._collator.collate(self._dataset, chosen)
                yield {n: getattr(batch, n).numpy() for n in ("input_ids", "attention_mask", "labels")}

        return tuple(tuple(of(rank)) for rank in range(world_size))

    def _started(self, contender: Contender, setup: Setup, up: ExitStack) -> _Warm:
        side = up.enter_context(Side(contender, setup.world_size, self._folder))
        steps = [side.first_step(), *(side.step() for _ in range(WARM_UP - 1))]
        return _Warm(side, [step.loss for step in steps])

    def _row(self, setup: Setup, ours: Ours, theirs: _Warm) -> Figure:
        with ExitStack() as up:
            mine = self._started(ours, setup, up)
            times: dict[str, list[float]] = {mine.side.name: [], theirs.side.name: []}
            for pair in range(self._pairs):
                order = (mine, theirs) if pair % 2 == 0 else (theirs, mine)  # A B B A ...
                for one in order:
                    times[one.side.name].append(one.side.step().seconds)
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        found = median_interval(ratios)
        seconds = [statistics.median(values) for values in times.values()]
        values = {
            "kind": "time",
            "setup": setup.name,
            "processes": setup.world_size,
            "threads_per_process": mine.side.threads,
            "ours": ours.recipe.method.name,
            "peer": theirs.side.name,
            "ratio": found.median,
            "interval_95": [found.low, found.high],
            "pairs": self._pairs,
            "ratios": ratios,
            "seconds": seconds,
            "tokens_per_second": [self._about["tokens"] / s for s in seconds],
            "first_losses": [mine.losses, theirs.losses],
            **self._about,
        }
        text = f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]  ({seconds[0]:.3f} and {seconds[1]:.3f} s)"
        return Figure(f"step, {setup.name}: {ours.recipe.method.name} / {theirs.side.name}", text, values)

    def _peak(self, setup: Setup, contender: Contender) -> int:
        key = (setup.name, contender.name)
        if key not in self._peaks:
            with Side(contender, setup.world_size, self._folder, fresh=True) as side:
                steps: list[Step] = [side.first_step(), *(side.step() for _ in range(WARM_UP - 1))]
            self._peaks[key] = steps[-1].peak_memory
        return self._peaks[key]


@dataclass(frozen=True)
class _Warm:
    """A side after its first steps."""

    side: Side
    losses: list[float]


def _with_method(recipe: Recipe, method: str) -> Recipe:
    """Return `recipe` with adapter and method of that method's quickstart recipe."""
    shipped = load_recipe("quickstart" if method == "pe_dyra" else f"quickstart_{method}")
    section = shipped.method
    if isinstance(section, WeightLoRAConfig | WeightLoRAPlusConfig):
        # k is of the quickstart's linears; a smaller model has fewer.
        linears = AutoConfig.from_pretrained(recipe.model.path).num_hidden_layers * len(LLAMA_LINEARS)
        section = section.model_copy(update={"k": max(1, section.k * linears // QUICKSTART_LINEARS)})
    return recipe.model_copy(update={"adapter": shipped.adapter, "method": section})
