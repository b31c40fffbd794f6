"""`dynrank plan`: what a run needs on a number of GPUs, without any."""

from __future__ import annotations

from dataclasses import fields

from dynrank_ds.errors import RecipeError
from dynrank_ds.planning.plan import CONTEXT, GIB, SLACK, Cluster, Plan, first_change, make_plan
from dynrank_ds.planning.speed import ARITHMETIC, HARDWARE, LINKS
from dynrank_ds.recipe import Recipe


def plan(
    recipe: Recipe, nodes: int, gpus_per_node: int, gpu_memory_gib: float, gpu: str, samples: int | None
) -> str:
    """Return a plan as text.

    Raises:
        RecipeError, ModelError: a number is no number of GPUs, or the recipe cannot run on so many.
    """
    return _described(recipe, _made(recipe, nodes, gpus_per_node, gpu_memory_gib, gpu, samples), samples)


def plan_that_fits(recipe: Recipe, nodes: int, gpus_per_node: int, gpu_memory_gib: float, gpu: str) -> str:
    """Return a plan as text, of a run that fits.

    Raises:
        RecipeError, ModelError: as `plan`, or the run does not fit; the first change that would make it is named.
    """
    made = _made(recipe, nodes, gpus_per_node, gpu_memory_gib, gpu, None)
    if not made.fits:
        raise RecipeError(
            f"{nodes} x {gpus_per_node} GPUs of {gpu_memory_gib:g} GiB: by its plan the run "
            f"{_verdict(recipe, made, None)}; `dynrank plan` shows what takes how much"
        )
    return _described(recipe, made, None)


def _made(
    recipe: Recipe, nodes: int, gpus_per_node: int, gpu_memory_gib: float, gpu: str, samples: int | None
) -> Plan:
    given = {"nodes": nodes, "gpus-per-node": gpus_per_node, "gpu-memory-gib": gpu_memory_gib}
    given["samples"] = 1 if samples is None else samples
    for name, value in given.items():
        if value <= 0:
            raise RecipeError(f"--{name} is {value}: give a number above 0")
    return make_plan(recipe, Cluster(nodes, gpus_per_node, gpu_memory_gib * GIB, HARDWARE[gpu]), samples)


def _described(recipe: Recipe, made: Plan, samples: int | None) -> str:
    cluster = made.cluster
    start = made.architecture.trainable_parameters
    return "\n".join(
        [
            f"model       {recipe.model.path}: {made.architecture.base_parameters:,} parameters"
            + (
                f", {made.architecture.packed.weights:,} of them in 4 bits"
                if recipe.model.quantisation
                else ""
            ),
            f"adapter     {recipe.method.name}: {start:,} trainable parameters at start "
            f"({start / made.architecture.base_parameters:.3%}), {made.most_parameters:,} at most",
            f"batch       {recipe.train.global_batch_size} samples a step: {cluster.gpus} GPUs x "
            f"{recipe.train.micro_batch_size} x {made.accumulation} accumulated, of at most {made.batch.tokens} tokens",
            *_memory(made),
            _host(made),
            _traffic(made),
            *_time(made),
            f"verdict     {_verdict(recipe, made, samples)}",
        ]
    )


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}"


def _host(made: Plan) -> str:
    needs, processes = made.memory, made.cluster.gpus_per_node
    text = f"host        {_gib(needs.host_while_loading * processes)} GiB a node while the base is loaded"
    if needs.host_of_optimizer:
        text += f", {_gib(needs.host_of_optimizer * processes)} GiB for the optimizer"
    if needs.host_of_parameters:
        text += f", {_gib(needs.host_of_parameters * processes)} GiB for the parameters"
    return text


def _traffic(made: Plan) -> str:
    moved = made.traffic
    within = f" ({_gib(moved.within_node)} of it from its own node)" if moved.within_node else ""
    host = f", {_gib(moved.from_host)} GiB from the machine's memory" if moved.from_host else ""
    return (
        f"traffic     {_gib(moved.parameters)} GiB of parameters{within} and {_gib(moved.gradients)} GiB of gradients "
        f"received by a GPU and step{host}, at most {moved.adjustment / 2**20:.1f} MiB an adjustment"
    )


def _memory(made: Plan) -> list[str]:
    parts = made.memory.parts
    lines = [f"memory      of a GPU, in GiB, when it is largest: {made.memory.moment}"]
    lines += [f"  {field.name:<20}{_gib(getattr(parts, field.name)):>8}" for field in fields(parts)]
    lines.append(f"  {f'allocator, {SLACK:.0%}':<20}{_gib(parts.total * SLACK):>8}")
    lines.append(f"  {'CUDA, NCCL':<20}{_gib(CONTEXT):>8}")
    lines.append(f"  {'sum':<20}{_gib(made.gpu_bytes):>8}  of {_gib(made.cluster.memory)}")
    return lines


def _time(made: Plan) -> list[str]:
    hardware, time = made.cluster.hardware, made.time
    rates = f"{hardware.within_node / 1e9:.0f} GB/s within a node"
    if made.cluster.nodes > 1:
        rates += f", {hardware.between_nodes / 1e9:.0f} GB/s a GPU between nodes"
    lines = [
        f"step        {time.overlapped:.2f} s where traffic is hidden, {time.serial:.2f} s where it is not: "
        f"{time.arithmetic:.2f} s of arithmetic,",
        f"            {time.traffic:.2f} s of traffic; all samples taken to be of the largest length",
        f"            at {ARITHMETIC:.0%} of {hardware.flops / 1e12:.0f} TFLOP/s and {LINKS:.0%} of {rates} "
        f"({hardware.name})",
    ]
    if made.steps is None:
        return [*lines, "run         give --samples, the rows of the data set, for its steps and hours"]
    hours = [made.steps * seconds / 3600 for seconds in (time.overlapped, time.serial)]
    return [
        *lines,
        f"run         {made.steps:,} steps, {made.adjustments} adjustments, at most {hours[0]:.1f} hours, or "
        f"{hours[1]:.1f} where traffic is not hidden",
    ]


def _verdict(recipe: Recipe, made: Plan, samples: int | None) -> str:
    share = made.gpu_bytes / made.cluster.memory
    if made.fits:
        return f"fits: {share:.0%} of the GPU's memory"
    change = first_change(recipe, made, samples)
    if change is None:
        return f"does not fit: {share:.0%} of the GPU's memory, and 64 nodes would not help"
    return (
        f"does not fit: {share:.0%} of the GPU's memory; first change: {change.what}, "
        f"with which it takes {change.plan.gpu_bytes / change.plan.cluster.memory:.0%}"
    )
