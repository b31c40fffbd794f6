"""The sections of a recipe: every key with its type, default and meaning, and what can be checked of one section.

model:     what is fine-tuned            train:     steps, batch, learning rate
data:      what it learns                deepspeed: which ZeRO configuration
adapter:   where triples go, how many    output:    where the run directory lies
method:    how ranks change              eval:      what `dynrank-eval` is to score afterwards

Those of the methods, `method`, are in dynrank_ds/methods, each beside its method.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from dynrank_ds.adapters.linear import Variant
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
"""The union's member is chosen before it is validated, so that a mistake is reported once."""


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
