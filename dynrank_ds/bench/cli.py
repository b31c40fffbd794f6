"""Runs benchmarks by name and prints what each measured, one figure a line."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dynrank_ds.bench.adjustment import measure_adjustment
from dynrank_ds.bench.checkpoint import measure_checkpoint
from dynrank_ds.bench.data import measure_data
from dynrank_ds.bench.evaluation import measure_eval
from dynrank_ds.bench.figures import Figure
from dynrank_ds.bench.linear import measure_linear
from dynrank_ds.bench.load import measure_load
from dynrank_ds.bench.machine import machine, versions
from dynrank_ds.bench.merge import measure_merge
from dynrank_ds.bench.peers import measure_peers, measure_trend
from dynrank_ds.bench.scale import measure_scale
from dynrank_ds.bench.startup import measure_startup
from dynrank_ds.bench.step import measure_step
from dynrank_ds.errors import DynrankError, RecipeError
from dynrank_ds.recipe import Recipe, load_recipe

Benchmark = Callable[[Recipe, bool], Iterator[Figure]]
BENCHMARKS: dict[str, Benchmark] = {
    "data": measure_data,
    "load": measure_load,
    "checkpoint": measure_checkpoint,
    "merge": measure_merge,
    "linear": measure_linear,
    "step": measure_step,
    "adjustment": measure_adjustment,
    "scale": measure_scale,
    "startup": measure_startup,
    "peers": measure_peers,
    "peers_trend": measure_trend,
    "eval": measure_eval,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after a mistake of the user, which is one sentence on stderr."""
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
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures, the machine and versions there"
    )
    arguments = parser.parse_intermixed_args(argv)
    names = [word for word in arguments.words if "=" not in word] or list(BENCHMARKS)
    overrides = [word for word in arguments.words if "=" in word]
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"there is no benchmark '{name}': known are {', '.join(BENCHMARKS)}")
    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe = load_recipe(arguments.recipe, overrides)
        if arguments.json and not arguments.json.parent.is_dir():
            raise RecipeError(f"--json {arguments.json}: there is no folder {arguments.json.parent}, make it")
        measured: dict[str, list[dict[str, Any]]] = {}
        for name in names:
            for figure in BENCHMARKS[name](recipe, arguments.quick):
                measured.setdefault(name, []).append(figure._asdict())
                if first:
                    print(f"{name:10} {figure.what:44} {figure.text}", flush=True)
                if first and arguments.json:  # after every figure: a run that is stopped keeps what it has
                    _write(arguments.json, sys.argv[1:] if argv is None else argv, measured)
    except DynrankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(path: Path, argv: Sequence[str], measured: dict[str, list[dict[str, Any]]]) -> None:
    content = {
        "command": shlex.join(["python", "-m", "dynrank_ds.bench", *argv]),
        "machine": machine(),
        "versions": versions(),
        "benchmarks": measured,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
