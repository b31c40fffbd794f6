"""What dynamic rank would add on 8 and 64 GPUs: the planner's step, and shares that are measured here.

No GPU is asked that is not here. The planner counts operations and bytes and divides them by the makers' speeds, of
which it assumes 40 and 70 % to be reached (`dynrank_ds/planning/speed.py`). Two parts are measured on this machine: the
method's seconds by those of a decoder layer, and the seconds of the engine's rebuild by adapted modules, in 2
processes. Both are assumed to hold there; the latency of collectives between nodes is not known here and left out.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynrank_ds.bench.adjustment import REPETITIONS, AdjustingRuns, Point, random_recipe
from dynrank_ds.bench.figures import Figure, Interval, median_interval
from dynrank_ds.bench.step import STEPS_BETWEEN_ADJUSTMENTS, Timing
from dynrank_ds.planning.architecture import describe
from dynrank_ds.planning.plan import GIB, Cluster, Plan, make_plan
from dynrank_ds.planning.speed import HARDWARE, LINKS, rate_everywhere
from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.training.run import set_up
from dynrank_ds.zero import processes

TARGETS = (
    ("7B on 8 h100", "llama2_7b_metamathqa_pe_dyra", 1),
    ("70B on 64 h100", "llama2_70b_metamathqa_pe_dyra", 8),
)
"""Name, recipe, and nodes of 8 GPUs with 80 GiB each."""
LAYER = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""LLaMA-2-7B's, on which the method's share is measured."""
NARROW_LAYER = LAYER | {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""For --quick. A method's work grows with a layer's width, arithmetic with its square: here the share is larger."""
RANK, SAMPLES = 4, 4


@dataclass(frozen=True)
class Measured:
    """What this machine gives to a prediction."""

    share: float
    """Seconds of the method in a step by the seconds of the decoder's layers."""
    rebuild: float
    """Seconds of an adjustment, its traffic included, by adapted modules."""


def measure_scale(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield both measured parts, and from them a planned step and what dynamic rank adds to it.

    Of the recipe are taken method, data and DeepSpeed's configuration of what is measured. Quick: a narrower layer.

    Raises:
        RecipeError: as `measure_adjustment`.
    """
    layer = NARROW_LAYER if quick else LAYER
    with tempfile.TemporaryDirectory() as folder:
        point = Point(2, 56, RANK)
        rebuild = _rebuild(AdjustingRuns(recipe, Path(folder)), point)
        yield Figure(
            f"measured: adjustment by modules, {point}",
            f"{1e3 * rebuild.median:.1f} [{1e3 * rebuild.low:.1f}, {1e3 * rebuild.high:.1f}] ms",
            {"seconds": rebuild.median, "interval_95": [rebuild.low, rebuild.high]},
        )
        one_layer = Path(folder) / "layer"
        one_layer.mkdir()
        share = median_interval(_shares(random_recipe(recipe, layer, RANK, SAMPLES, one_layer)))
    yield Figure(
        f"measured: the method by a layer {layer['hidden_size']} wide",
        f"{share.median:+.2%} [{share.low:+.2%}, {share.high:+.2%}]",
        {"share": share.median, "interval_95": [share.low, share.high], "layer": layer},
    )
    for name, of, nodes in TARGETS:
        plan = make_plan(load_recipe(of), Cluster(nodes, 8, 80 * GIB, HARDWARE["h100"]))
        yield from predicted(name, plan, Measured(share.median, rebuild.median))


def predicted(name: str, plan: Plan, measured: Measured) -> Iterator[Figure]:
    """Yield the planned seconds of a step, of what the method adds to it, and of an adjustment.

    The step after an adjustment is taken to hide no traffic, because DeepSpeed records it without fetching ahead.
    """
    time, cluster = plan.time, plan.cluster
    modules = len(plan.architecture.modules)
    links = rate_everywhere(cluster.hardware, cluster.nodes, cluster.gpus_per_node) * LINKS
    method = measured.share * time.arithmetic
    parts = {
        "rebuild": measured.rebuild * modules,
        "traffic": plan.traffic.adjustment / links,
        "the step after it": time.serial - time.overlapped,
    }
    adjustment = sum(parts.values())
    yield Figure(
        f"planned: step of {name}",
        f"{time.overlapped:.2f} s, or {time.serial:.2f} s where traffic is not hidden: "
        f"{time.arithmetic:.2f} s of arithmetic, {time.traffic:.2f} s of traffic",
        {"arithmetic": time.arithmetic, "traffic": time.traffic, "gpus": cluster.gpus},
    )
    listed = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
    yield Figure(
        f"predicted: an adjustment of {name}",
        f"{adjustment:.2f} s ({listed}), {adjustment / time.overlapped:.1f} steps",
        {"seconds": parts, "modules": modules, "bytes": plan.traffic.adjustment},
    )
    # Of both kinds of step the shorter one, of which the same seconds are a larger share.
    steady = method / time.overlapped
    spread = adjustment / STEPS_BETWEEN_ADJUSTMENTS / time.overlapped
    yield Figure(
        f"predicted: added to {name}",
        f"{steady + spread:+.1%} of the step, adjusting every {STEPS_BETWEEN_ADJUSTMENTS} steps: "
        f"{steady:+.1%} in each and {spread:+.1%} by adjustments",
        {"in_each_step": steady, "by_adjustments": spread, "interval": STEPS_BETWEEN_ADJUSTMENTS},
    )


def _rebuild(runs: AdjustingRuns, point: Point) -> Interval:
    """Return the seconds of adjustments by modules, each of the process that took longest."""
    found = zip(*(process[1:] for process in runs.adjust(point, 1 + REPETITIONS)), strict=True)
    return median_interval([max(sum(a.seconds.values()) for a in both) / point.modules for both in found])


def _shares(recipe: Recipe) -> list[float]:
    """Return, step by step, the method's seconds by those of the layers in a step without it."""
    of = describe(recipe)
    in_layers = (
        1 - of.vocabulary * of.hidden / of.base_parameters
    )  # of the arithmetic; the rest is the head's
    device = processes.start(recipe.deepspeed.timeout)
    timing = Timing(set_up(recipe, False, device))
    timing.seconds([(timing.quiet, True)] * 3)  # DeepSpeed records the first
    shares = [
        sum(timing.seconds_inside().values())
        / (in_layers * statistics.mean(timing.seconds([(timing.quiet, False)] * 2)))
        for _ in range(REPETITIONS)
    ]
    processes.stop()
    return shares
