"""The recipe: one YAML file that says everything about a run, what is checked across its sections, and its loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from dynrank_ds.adapters.linear import Variant
from dynrank_ds.composing import read_recipe
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import AnyMethodConfig, method_class
from dynrank_ds.methods.base import HIDDEN_SIZE_OF_DEFAULT_RATES
from dynrank_ds.ranking.schedule import resolve_steps
from dynrank_ds.recipe_mistakes import sentence
from dynrank_ds.recipe_sections import (
    AdapterSection,
    DataSection,
    DeepSpeedSection,
    EvalSection,
    ModelSection,
    OutputSection,
    SourceSection,
    TrainSection,
)
from dynrank_ds.section import Section, inconsistent

_KEYS_OF_VARIANTS: dict[Variant, str] = {
    "weight_decomposed": "adapter.weight_decomposed is true",
    "pissa": "adapter.init is pissa",
}


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    method: AnyMethodConfig
    train: TrainSection = TrainSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    output: OutputSection
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _refuse_max_rank_below_the_ranks_of_the_run(self) -> Recipe:
        limit, mean = self.adapter.max_rank, self.method.final_mean_rank(self.adapter.rank)
        if limit is not None and limit < self.adapter.rank:
            raise inconsistent(f"adapter.max_rank {limit} is below adapter.rank {self.adapter.rank}")
        above = {
            name: rank for name, rank in self.adapter.ranks.items() if limit is not None and rank > limit
        }
        if above:
            raise inconsistent(f"adapter.max_rank {limit} is below adapter.ranks of {next(iter(above))}")
        if self.adapter.ranks and self.adapter.init_from is not None:
            raise inconsistent(
                "adapter.ranks is given with adapter.init_from, whose adapter has ranks of its own"
            )
        if limit is not None and mean is not None and limit < mean:
            raise inconsistent(
                f"adapter.max_rank {limit} is below {mean}, the mean rank that {self.method.name} ends with"
            )
        return self

    @model_validator(mode="after")
    def _refuse_variants_that_do_not_combine(self) -> Recipe:
        variant, method = self.adapter.variant, method_class(self.method)
        given = f"{_KEYS_OF_VARIANTS.get(variant)} with method.name {self.method.name}"
        if method.per_head and variant != "plain":
            raise inconsistent(
                f"{given}, whose modules are attention heads: variants are of whole linear layers"
            )
        if reason := method.refused_variants.get(variant):
            raise inconsistent(f"{given}: {reason}")
        if self.adapter.init == "pissa" and self.adapter.weight_decomposed:
            raise inconsistent(
                "adapter.init is pissa with adapter.weight_decomposed true: a layer has one variant, give one of both"
            )
        if self.adapter.init == "pissa" and self.adapter.init_from is not None:
            raise inconsistent(
                "adapter.init is pissa with adapter.init_from, whose adapter has initial triples of its own: give one "
                "of both"
            )
        if self.adapter.dtype == "fp32" and variant != "plain":
            raise inconsistent(
                f"{_KEYS_OF_VARIANTS[variant]} with adapter.dtype fp32, which was not tried: leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _refuse_sources_without_room(self) -> Recipe:
        if isinstance(self.data.source, str):
            return self
        sources, batch = self.data.source, self.train.global_batch_size
        total = sum(one.share for one in sources.values())
        if abs(total - 1) > 1e-6:
            raise inconsistent(f"the shares of data.source are {total:g} together: they must be 1")
        for name, one in sources.items():
            if one.share * batch < 1 - 1e-6:
                raise inconsistent(
                    f"data.source.{name}.share is {one.share:g} of train.global_batch_size {batch}: give each source "
                    "at least one sample of every global batch"
                )
        if self.train.steps is None and self.train.epochs is not None:
            raise inconsistent(
                "several sources have no common epoch: give train.steps instead of train.epochs"
            )
        for key in ("split", "revision", "filter", "limit"):
            if getattr(self.data, key):
                raise inconsistent(f"data.{key} is given beside several sources: give it to one of them")
        return self

    @property
    def triples_in_bf16(self) -> bool:
        """Whether triples are bf16 in forward and backward, and DeepSpeed keeps fp32 master weights beside them."""
        return self.model.dtype == "bf16" and self.adapter.dtype == "model"

    def accumulation(self, world_size: int) -> int:
        """Return the number of micro-batches per process and step.

        Raises:
            RecipeError: the global batch is not a whole number of micro-batches of all processes.
        """
        samples = self.train.micro_batch_size * world_size
        if self.train.global_batch_size % samples:
            raise RecipeError(
                f"train.global_batch_size {self.train.global_batch_size} is no multiple of train.micro_batch_size "
                f"{self.train.micro_batch_size} x {world_size} processes = {samples}"
            )
        return self.train.global_batch_size // samples

    def total_steps(self, samples: int) -> int:
        """Return the number of optimizer steps of a run with this many samples."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return max(1, round(self.train.epochs * samples / self.train.global_batch_size))

    def with_dtype(self, dtype: str) -> Recipe:
        """Return this recipe with model.dtype `dtype`, bf16 or fp32.

        Raises:
            RecipeError: model.attention needs another dtype.
        """
        if self.model.attention.startswith("flash") and dtype == "fp32":
            raise RecipeError(
                f"model.dtype is fp32: model.attention {self.model.attention} needs bf16, or take auto"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"dtype": dtype})})

    @property
    def scale(self) -> float:
        """s in y = W x + s B^T diag(g) A x."""
        if self.adapter.alpha is None:
            return method_class(self.method).default_scale
        return self.adapter.alpha / self.adapter.alpha_at_scale_one

    def default_rate(self, hidden_size: int) -> float:
        """Return the method's learning rate for a model of this hidden size.

        It is in inverse proportion to the hidden size above that of the model on which the methods' rates were
        measured, and the same below.
        """
        rate = method_class(self.method).default_rate * min(1.0, HIDDEN_SIZE_OF_DEFAULT_RATES / hidden_size)
        return float(f"{rate:.3g}")

    def with_defaults(self, hidden_size: int, before: Mapping[str, Any] | None = None) -> Recipe:
        """Return this recipe with the values that depend on method and model: adapter.alpha and train.learning_rate.

        before: the recipe of the run that is resumed, which keeps what it began with.
        """
        alpha, rate = self.adapter.alpha, self.train.learning_rate
        if alpha is None:
            alpha = before["adapter"]["alpha"] if before else self.scale * self.adapter.alpha_at_scale_one
        if rate is None:
            rate = before["train"]["learning_rate"] if before else self.default_rate(hidden_size)
        return self.model_copy(
            update={
                "adapter": self.adapter.model_copy(update={"alpha": alpha}),
                "train": self.train.model_copy(update={"learning_rate": rate}),
            }
        )

    def dump(self) -> str:
        """Return the recipe as YAML, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a shipped recipe by name, a file by path, or parts A+B+C, with `section.key=value` overrides, checked.

    Values of overrides are YAML. dynrank_ds/composing.py says how bases are composed.

    Raises:
        RecipeError: whatever is wrong with it, in one sentence.
    """
    return check_recipe(read_recipe(name, overrides), name)


def check_recipe(values: dict[str, Any], name: str) -> Recipe:
    """Return the recipe of these values; `name` is for messages."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{name}: {sentence(error, values, Recipe, SourceSection)}") from error
    if (recipe.train.steps is None) == (recipe.train.epochs is None):
        given = "both" if recipe.train.steps else "neither"
        raise RecipeError(f"{name}: {given} of train.steps and train.epochs is given: give exactly one")
    try:
        recipe.with_dtype(recipe.model.dtype)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
    # Refused here: the schedule asks only once the run has begun.
    resolve_steps(recipe.train.warmup, 1, f"{name}: train.warmup")
    if isinstance(recipe.data.held_out, float) and recipe.data.held_out >= 1:
        raise RecipeError(
            f"{name}: data.held_out is {recipe.data.held_out}: give whole samples, or a share below 1"
        )
    if recipe.train.held_out_interval is not None and not recipe.data.held_out:
        raise RecipeError(
            f"{name}: train.held_out_interval is given, but data.held_out is 0: no sample is held out"
        )
    return recipe
