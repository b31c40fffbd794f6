"""The recipe: one YAML file that says everything about a run, its checks and their messages.

model:     what is fine-tuned            train:     steps, batch, learning rate
data:      what it learns                deepspeed: which ZeRO configuration
adapter:   where triples go, how many    output:    where the run directory lies
method:    how ranks change              eval:      what `dynrank-eval` is to score afterwards
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, to_jsonable_python

from dynrank_ds.adapters.linear import Variant
from dynrank_ds.composing import read_recipe
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import AnyMethodConfig, method_class
from dynrank_ds.methods.base import HIDDEN_SIZE_OF_DEFAULT_RATES
from dynrank_ds.ranking.schedule import resolve_steps
from dynrank_ds.recipe_mistakes import sentence
from dynrank_ds.section import Section, inconsistent

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _expand(path: str) -> str:
    """Return the path with `~`, `$VAR` and `${VAR}` replaced."""
    if unset := [name for name in re.findall(r"\$\{?(\w+)\}?", path) if name not in os.environ]:
        raise PydanticCustomError("unset", "the environment variable {name} is not set", {"name": unset[0]})
    return os.path.expanduser(os.path.expandvars(path))


LocalPath = Annotated[str, AfterValidator(_expand)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Scalar = str | int | float | bool


def _check_targets(targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise PydanticCustomError(
                "pattern",
                "no regular expression ({error}); names are given as a list",
                {"error": str(error)},
            ) from error
    elif not targets:
        raise PydanticCustomError("empty", "an empty list adapts nothing: name at least one linear layer")
    return targets


Targets = Annotated[tuple[str, ...] | str, AfterValidator(_check_targets)]


def _check_quantisation(value: object) -> object:
    if value in ("int8", "8bit", 8):
        raise PydanticCustomError(
            "int8",
            "not supported: bitsandbytes takes int8 weights out of their parameters at the first forward, where ZeRO "
            "would look for them; give nf4",
        )
    return value


class ModelSection(Section):
    path: LocalPath
    """Folder of a Hugging Face model, or its hub id."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device computes it natively, else fp32; a resumed run keeps what it began with."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Kernel of transformers. auto: FlashAttention 3 or 2 if installed (GPU, bf16), else sdpa if the model has it."""
    quantisation: Annotated[Literal["nf4"] | None, BeforeValidator(_check_quantisation)] = None
    """nf4: the base's linear layers, but for the output layer, in 4 bits a weight by bitsandbytes, as in QLoRA."""
    double_quantisation: bool = False
    """Quantise the scales of nf4 too: 0.37 bits a weight less."""

    @model_validator(mode="after")
    def _refuse_double_quantisation_of_nothing(self) -> ModelSection:
        if self.double_quantisation and self.quantisation is None:
            raise inconsistent("model.double_quantisation is given without model.quantisation: give nf4 too")
        return self


class SourceSection(Section):
    source: LocalPath
    """As data.source."""
    share: float = Field(gt=0, lt=1)
    """Of every global batch; all shares together are 1."""
    split: str | None = None
    revision: str | None = None
    filter: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)
    format: LocalPath | None = None
    """By default data.format; columns likewise."""
    columns: dict[str, str] | None = None


_Sources = Annotated[
    Annotated[LocalPath, Tag("one source")] | Annotated[dict[str, SourceSection], Tag("several sources")],
    Discriminator(lambda value: "several sources" if isinstance(value, dict) else "one source"),
]
"""Told apart before they are checked, so that a mistake is reported once."""


class DataSection(Section):
    source: _Sources
    """File (JSON, CSV, Parquet; .gz too), folder, hub id of a data set, `generated:gsm_symbolic`; or several."""
    split: str | None = None
    """Split of a folder or hub data set; by default train."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; a commit makes sure that it never changes."""
    streaming: bool = False
    """Read a hub data set while downloading, without a copy of it on disk."""
    filter: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    """Take only rows whose fields have these values (or one of several)."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first rows, of those that pass the filter."""
    format: LocalPath = "metamathqa"
    """Which fields of a row are prompt and answer, and the prompt: dynrank_ds/data/README.md; or a Jinja file."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of other names: {field of the format: column of the data}."""
    max_length: int = Field(default=512, ge=2)
    """Longest sample in tokens, prompt and answer together."""
    overflow: Literal["drop", "truncate"] = "drop"
    """What becomes of longer rows: dropped and counted, or cut at their end."""
    max_dropped: float = Field(default=0.01, ge=0, le=1)
    """Largest share of rows that may be dropped without failing."""
    packing: bool = False
    """Lay the samples of a micro-batch one after another without padding, each seeing only itself."""
    held_out: int | float = Field(default=0, ge=0)
    """Samples (or a share of them, below 1) that are never trained on, drawn by train.seed; their loss is logged."""


class AdapterSection(Section):
    rank: int = Field(default=4, ge=1)
    """Triples of each adapted module when training begins."""
    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scale s in y = W x + s B^T diag(g) A x; by default what gives the method's own scale, 2 or 8 or
    4/3: dynrank_ds/methods/README.md."""
    scaling: Literal["rank", "root_rank"] = "rank"
    """The scale s of every module, fixed for the whole run: alpha / rank, or alpha / sqrt(rank) as in rsLoRA."""
    dtype: Literal["model", "fp32"] = "model"
    """Of triples in forward and backward: the model's, or fp32 beside a bf16 base; master weights are always fp32."""
    weight_decomposed: bool = False
    """Train a magnitude for each output row beside its direction, as in DoRA (Liu et al., 2024); not `dynamic_dora`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an element of an adapter's input is 0 in training; masks do not depend on world size."""
    targets: Targets = LLAMA_LINEARS
    """Names of linear layers; or a regular expression that matches whole full names; or all-linear."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Numbers of the decoder layers that alone are adapted; by default all."""
    max_rank: int | None = Field(default=None, ge=1)
    """Upper limit of a module's rank; by default min(in, out, 512)."""
    ranks: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Ranks of single modules when training begins, by full name or a dotted end of it; others have adapter.rank."""
    init: Literal["default", "pissa"] = "default"
    """pissa: triples begin as the top-r SVD of the weight, which is subtracted again; default: as the method has it."""
    init_from: LocalPath | None = None
    """Folder of a PEFT LoRA adapter to start from, with its ranks; adapter.rank then sets the scale alone."""

    @property
    def variant(self) -> Variant:
        """What adapted linears are."""
        if self.init == "pissa":
            return "pissa"
        return "weight_decomposed" if self.weight_decomposed else "plain"

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the upper limit of the rank of a module of these sides."""
        return min(in_features, out_features, self.max_rank or max(512, self.rank))

    @property
    def alpha_at_scale_one(self) -> float:
        """What alpha is divided by."""
        return self.rank if self.scaling == "rank" else self.rank**0.5


class TrainSection(Section):
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give either steps or epochs."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data, a fraction too."""
    global_batch_size: int = Field(default=8, ge=1)
    """Samples of an optimizer step, over all processes."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Samples of a forward on one process; accumulation follows from it and the number of processes."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate of the schedule; by default the method's and model's (dynrank_ds/methods/README.md)."""
    lora_b_rate: float = Field(default=1.0, gt=0)
    """What lora_B's learning rate is multiplied by: 1, or about 16 for LoRA+ (Hayou et al., 2024)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up: to 0 linearly or as a half cosine, or not."""
    warmup: int | float = Field(default=0, ge=0)
    """Steps, or a fraction of training below 1, over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, of the adapter's weights alone."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """What AdamW adds to the root of its second moment, by which it divides."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Norm of the global batch's gradient above which it is scaled down; 0 does not clip."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial values, new triples, the order of samples and the choice of held-out samples."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer's activations in backward instead of keeping them."""
    checkpoint_interval: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; the last step always writes one, by default the only one."""
    checkpoints_kept: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept; a second one serves where the newest is damaged."""
    held_out_interval: int | None = Field(default=None, ge=1)
    """Steps between losses of data.held_out, after each of which the best checkpoint is kept; the last step has one, by
    default the only one."""

    @property
    def peak_rate(self) -> float:
        """`learning_rate` of a recipe whose defaults were filled in (`Recipe.with_defaults`)."""
        assert self.learning_rate is not None
        return self.learning_rate


class DeepSpeedSection(Section):
    config: LocalPath = "zero3"
    """Name of a file of ds_configs without its ending (zero3, zero3_offload, zero2, ...), or the path of yours."""
    timeout: float = Field(default=600, gt=0)
    """Seconds that processes wait for one of them before the run ends."""


class OutputSection(Section):
    dir: LocalPath
    """The run directory: logs, checkpoints, adapter; by default runs/ and the recipe's name."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers that the first process writes to: dynrank_ds/report/README.md."""
    log_batches: bool = False
    """Log at each step a hash of what each process trained on, `batch_sha256`: equal in runs of equal batches."""


class EvalSection(Section):
    tasks: tuple[str, ...] = ()
    """Tasks of dynrank-eval, for a script that scores the run; training does not read them."""
    data_dir: LocalPath | None = None
    """Folder of the tasks' data files, --data-dir of dynrank-eval."""


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


VALUES_BEFORE_KEYS_EXISTED: dict[str, Any] = {}
"""`section.key` of keys whose default is not how runs behaved before the key existed, with what they did then."""


def value_before_key_existed(recipe: Recipe, section: str, key: str) -> Any:
    """Return the value that a run had for a key which its recipe does not know: by default the key's default."""
    path = f"{section}.{key}"
    if path in VALUES_BEFORE_KEYS_EXISTED:
        return VALUES_BEFORE_KEYS_EXISTED[path]
    fields = type(getattr(recipe, section)).model_fields
    if key not in fields or fields[key].is_required():
        return None
    return to_jsonable_python(fields[key].get_default(call_default_factory=True))
