"""Seconds from the start of the interpreter to the end of the first step, by part."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from dynrank_ds.bench.figures import Figure
from dynrank_ds.errors import DynrankError, RecipeError
from dynrank_ds.recipe import Recipe

PARTS = {
    "data": ("prepare_data",),
    "model": ("load_model", "adapt"),
    "engine": ("ZeroEngine",),
    "loss check": ("check_loss",),
}
"""What `dynrank_ds.training.run` calls for each part."""


def measure_startup(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield seconds of a start with an empty cache of tokenised data, and of 3 (quick: 1) later starts, by part.

    One process a start, as `train.py` is without a launcher, which adds its own imports and one of the interpreter.

    Raises:
        RecipeError: the benchmark was started in several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("the benchmark startup starts its own processes: start it in one")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DYNRANK_CACHE"] = f"{folder}/cache"
        for name in ("first start", *(f"start {n}" for n in ((2,) if quick else (2, 3, 4)))):
            output = recipe.output.model_copy(update={"dir": f"{folder}/{name.replace(' ', '-')}"})
            seconds = _start(recipe.model_copy(update={"output": output}))
            total = sum(seconds.values())
            yield Figure(f"{name}, in all", f"{total:.1f} s", {"start": name, "seconds": seconds})
            for part, found in seconds.items():
                yield Figure(f"{name}, {part}", f"{found:.1f} s, {found / total:.0%}")


def _start(recipe: Recipe) -> dict[str, float]:
    """Return the seconds of each part in a new interpreter."""
    context: Any = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_first_step, args=(theirs, recipe, time.time()))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError as error:
        raise DynrankError("the process of the benchmark startup ended; what it printed says why") from error
    finally:
        process.join()
    if isinstance(found, DynrankError):
        raise found
    return dict(found)


class _Parts:
    """Adds up the seconds of named parts; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner
        self._inner = outer + took

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return call(*arguments, **named)

        return timed


def _first_step(connection: Connection, recipe: Recipe, began: float) -> None:
    """Send the seconds of each part until the end of the first step."""
    parts = _Parts()
    parts.seconds["interpreter and imports of the benchmark"] = time.time() - began
    try:
        with parts.part("imports"):
            run: Any = importlib.import_module("dynrank_ds.training.run")
            processes: Any = importlib.import_module("dynrank_ds.zero.processes")
        for part, names in PARTS.items():
            for name in names:
                setattr(run, name, parts.timed(part, getattr(run, name)))
        with parts.part("process group"):
            device = processes.start(recipe.deepspeed.timeout)
        with parts.part("the rest of setting up"):
            trainer = run.set_up(recipe, False, device)
        with parts.part("first step"):
            trainer.train(_stop_after_one)
        processes.stop()
    except DynrankError as error:
        connection.send(error)
        return
    connection.send(parts.seconds)


def _stop_after_one(result: Any) -> None:
    result.stop = True
