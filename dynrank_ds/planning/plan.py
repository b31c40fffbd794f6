"""A plan: memory, traffic and time of a run on a number of GPUs, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dynrank_ds.errors import RecipeError
from dynrank_ds.planning.activations import MicroBatch
from dynrank_ds.planning.architecture import ITEM, Architecture, describe
from dynrank_ds.planning.memory import Memory, memory
from dynrank_ds.planning.ranks import method_of, most_parameters, row_statistics
from dynrank_ds.planning.speed import Hardware, StepTime, step_time
from dynrank_ds.planning.traffic import Traffic, traffic
from dynrank_ds.recipe import Recipe
from dynrank_ds.zero.config import check_processes, load_config

GIB = 2**30
SLACK = 0.08
"""Of the tensors' bytes: what PyTorch's allocator holds beyond them (ours)."""
CONTEXT = 1.5 * GIB
"""CUDA's context, its kernels and NCCL's buffers on a GPU (ours)."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run."""

    nodes: int
    gpus_per_node: int
    memory: float
    """Bytes of a GPU."""
    hardware: Hardware

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Plan:
    """What a run is predicted to need."""

    architecture: Architecture
    cluster: Cluster
    batch: MicroBatch
    accumulation: int
    memory: Memory
    traffic: Traffic
    time: StepTime
    most_parameters: int
    steps: int | None
    """None where the number of samples is not known."""
    adjustments: int | None

    @property
    def gpu_bytes(self) -> float:
        """Of one GPU, with what is not tensors."""
        return self.memory.parts.total * (1 + SLACK) + CONTEXT

    @property
    def fits(self) -> bool:
        return self.gpu_bytes <= self.cluster.memory


def make_plan(
    recipe: Recipe, cluster: Cluster, samples: int | None = None, architecture: Architecture | None = None
) -> Plan:
    """Return the plan of a recipe on a cluster; every micro-batch is taken to be of longest samples, all targets.

    Args:
        recipe: model.dtype auto counts as bf16, which these GPUs have.
        cluster: that it runs on.
        samples: of the data set; by default data.limit.
        architecture: of the recipe's model, where it is known already.

    Raises:
        ModelError, RecipeError: there is no such model, or the recipe cannot run on so many processes.
    """
    if recipe.model.dtype == "auto":
        recipe = recipe.with_dtype("bf16")
    accumulation = recipe.accumulation(cluster.gpus)
    config = load_config(recipe.deepspeed.config, recipe.triples_in_bf16)
    check_processes(config, recipe.deepspeed.config, cluster.gpus)
    zero = config["zero_optimization"]
    of = architecture or describe(recipe)
    samples = samples or recipe.data.limit
    steps = recipe.total_steps(samples) if samples else recipe.train.steps
    # Without the number of steps no time in steps can be checked: a long run has room for all of them.
    method = method_of(recipe, of, steps or 1_000_000)
    most = most_parameters(recipe, of, method) if steps else of.trainable_parameters
    size = recipe.train.micro_batch_size
    batch = MicroBatch(size, recipe.data.max_length, size * recipe.data.max_length)
    needs = memory(recipe, of, zero, cluster.gpus, batch, most, row_statistics(recipe))
    moved = traffic(
        recipe,
        of,
        method,
        cluster.gpus,
        zero,
        needs.gathered_elements,
        of.trainable_parameters,
        ITEM[recipe.model.dtype],
    )
    time = step_time(
        of,
        batch,
        accumulation,
        recipe.train.activation_checkpointing,
        moved,
        cluster.hardware,
        cluster.nodes,
        cluster.gpus_per_node,
    )
    adjustments = method.planned_adjustments() if steps else None
    return Plan(of, cluster, batch, accumulation, needs, moved, time, most, steps, adjustments)


@dataclass(frozen=True)
class Change:
    """Something that a user can change, and the plan with it."""

    what: str
    plan: Plan


def first_change(recipe: Recipe, plan: Plan, samples: int | None = None) -> Change | None:
    """Return the first change that makes the run fit, the cheapest in speed and meaning first; None where none does.

    A base in 4 bits rounds weights, but takes no other machine: it comes before more nodes, which keep it in 16 bits.
    """
    for what, changed, cluster in _changes(recipe, plan):
        same = changed.model == recipe.model
        try:
            tried = make_plan(changed, cluster, samples, plan.architecture if same else None)
        except RecipeError:  # the batch is no multiple of so many processes
            continue
        if tried.fits:
            return Change(what, tried)
    return None


def _changes(recipe: Recipe, plan: Plan) -> list[tuple[str, Recipe, Cluster]]:
    """List what can be changed, one after another.

    Each contains those before it that change neither base nor machine.
    """
    cluster, train, found = plan.cluster, recipe.train, []
    said: list[str] = []

    def add(text: str, changed: Recipe) -> Recipe:
        said.append(text)
        found.append((" ".join(said), changed, cluster))
        return changed

    if load_config(recipe.deepspeed.config, recipe.model.dtype != "fp32")["zero_optimization"]["stage"] < 3:
        section = recipe.deepspeed.model_copy(update={"config": "zero3"})
        recipe = add("deepspeed.config=zero3", recipe.model_copy(update={"deepspeed": section}))
    if not train.activation_checkpointing:
        train = train.model_copy(update={"activation_checkpointing": True})
        recipe = add("train.activation_checkpointing=true", recipe.model_copy(update={"train": train}))
    if train.micro_batch_size > 1:
        train = train.model_copy(update={"micro_batch_size": 1})
        recipe = add("train.micro_batch_size=1", recipe.model_copy(update={"train": train}))
    if recipe.model.quantisation is None:
        model = recipe.model.model_copy(update={"quantisation": "nf4", "double_quantisation": True})
        text = " ".join([*said, "model.quantisation=nf4 model.double_quantisation=true"])
        found.append((text, recipe.model_copy(update={"model": model}), cluster))
    for nodes in range(cluster.nodes + 1, 65):
        more = dataclasses.replace(cluster, nodes=nodes)
        found.append((" ".join([*said, f"on {nodes} nodes ({more.gpus} GPUs)"]), recipe, more))
    return found
