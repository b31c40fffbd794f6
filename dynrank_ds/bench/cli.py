"""Runs benchmarks by name and prints what each measured, one figure a line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from dynrank_ds.bench.checkpoint import measure_checkpoint
from dynrank_ds.bench.data import measure_data
from dynrank_ds.bench.step import measure_step
from dynrank_ds.errors import DynrankError
from dynrank_ds.recipe import Recipe, load_recipe

Benchmark = Callable[[Recipe, bool], Iterator[tuple[str, str]]]
BENCHMARKS: dict[str, Benchmark] = {
    "data": measure_data,
    "checkpoint": measure_checkpoint,
    "step": measure_step,
}


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 the user's mistake in one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m dynrank_ds.bench",
        description="Measure what the project states about its speed.",
        epilog="example: python -m dynrank_ds.bench data --quick model.path=.cache/smollm2-135m-instruct",
    )
    parser.add_argument(
        "words", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; or section.key=value"
    )
    parser.add_argument("--recipe", default="quickstart", help="the model and data to measure with")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    arguments = parser.parse_intermixed_args(argv)
    names = [word for word in arguments.words if "=" not in word] or list(BENCHMARKS)
    overrides = [word for word in arguments.words if "=" in word]
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark '{name}': known are {', '.join(BENCHMARKS)}")
    try:
        recipe = load_recipe(arguments.recipe, overrides)
        for name in names:
            for what, figure in BENCHMARKS[name](recipe, arguments.quick):
                if os.environ.get("RANK", "0") == "0":
                    print(f"{name:10} {what:44} {figure}", flush=True)
    except DynrankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
