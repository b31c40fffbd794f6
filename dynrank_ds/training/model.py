"""The frozen base model, its tokenizer and its adapter."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynrank_ds.adapters.heads import head_splits
from dynrank_ds.adapters.inject import inject
from dynrank_ds.adapters.linear import VECTORS, AdaptedModule
from dynrank_ds.adapters.targets import describe_targets, find_linears, lost_in_peft
from dynrank_ds.errors import ModelError, RunError
from dynrank_ds.methods import method_class
from dynrank_ds.recipe import Recipe
from dynrank_ds.recipe_sections import ModelSection
from dynrank_ds.training.architecture import auto_class, check_config, check_layers, text_decoder
from dynrank_ds.training.attention import check_attention, choose_attention
from dynrank_ds.training.quantisation import keep_layout, quantisation_config
from dynrank_ds.training.starting import StartingAdapter, begin_magnitudes, ranks_of_linears
from dynrank_ds.training.streaming import NotStreamableError, load_streamed
from dynrank_ds.zero.partitioner import Partitioner

logger = logging.getLogger(__name__)

_UNFIT = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers raises of a folder that it cannot load."""
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_SECOND_COPIES = ["consolidated*", "original/*"]
"""Of the weights, for other programs, in some hub repositories."""
_FAR = 4
"""Times that a scale may be above or below the method's default before a warning."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_model_folder(path: str) -> None:
    """Refuse a path that looks like a folder and is none, or holds no model; hub ids pass.

    Raises:
        ModelError: with what to give instead.
    """
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ModelError(f"model.path {path} does not exist: give a model folder or a hub id")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"model.path {path} has no config.json: give the folder of a Hugging Face model")


def fetch_model(path: str) -> Path:
    """Return the model's folder; a hub id is downloaded into the hub's cache first: weights, configuration, tokenizer.

    The configuration comes first, so that what it shows is refused before gigabytes arrive.

    Raises:
        ModelError: there is no model there, or the hub cannot be reached.
    """
    check_model_folder(path)
    if Path(path).is_dir():
        return Path(path)
    load_config(path)
    try:
        folder = Path(snapshot_download(path, allow_patterns=_MODEL_FILES, ignore_patterns=_SECOND_COPIES))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path} cannot be fetched from the hub: {_short(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model.path {path} has no safetensors weights: name a model that has them")
    return folder


def load_config(path: str) -> PreTrainedConfig:
    """Return the model's configuration; of a hub id that file alone is downloaded.

    Raises:
        ModelError: there is none, or it is of a model that cannot be trained.
    """
    check_model_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        if Path(path).is_dir():
            raise ModelError(f"model.path {path} is no causal language model: {_short(error)}") from error
        raise ModelError(
            f"model.path {path}: its config.json cannot be fetched from the hub: {_short(error)}"
        ) from error
    except _UNFIT as error:
        raise ModelError(f"model.path {path} is no causal language model: {_short(error)}") from error
    check_config(config, path)
    return config


@cache
def hidden_size(path: str) -> int:
    """Return the width of the model's text decoder, by which its size is measured for default learning rates.

    Raises:
        ModelError: as `load_config`.
    """
    width: int = load_config(path).get_text_config().hidden_size
    return width


def with_defaults(recipe: Recipe, before: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe with adapter.alpha and train.learning_rate, by method and model where it gives none.

    before: the recipe of the run that is resumed, which keeps what it began with.

    Raises:
        ModelError: as `load_config`.
    """
    usual = method_class(recipe.method).default_scale
    if not usual / _FAR <= recipe.scale <= usual * _FAR:
        logger.warning(
            "adapter.alpha %g at rank %d is a scale of %.3g, far from the %.3g at which %s was tried: leave out "
            "adapter.alpha, or expect another learning rate to be right",
            recipe.scale * recipe.adapter.alpha_at_scale_one,
            recipe.adapter.rank,
            recipe.scale,
            usual,
            recipe.method.name,
        )
    return recipe.with_defaults(hidden_size(recipe.model.path), before)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        ModelError: there is no model there, or it has no tokenizer.
    """
    check_model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path {path} holds no tokenizer that transformers can load: {_short(error)}"
        ) from error


def load_model(
    section: ModelSection,
    activation_checkpointing: bool,
    partitioner: Partitioner | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Return the base model in training mode, no cache and no dropout: losses are functions of weights and data alone.

    Args:
        partitioner: reads each process's ZeRO-3 shards alone where the model allows it; by default all is read whole.
        device: that it is computed on, by default the CPU.

    Raises:
        ModelError: there is no causal language model there, or not all of its weights.
        MachineError: a package that quantises is missing.
    """
    config = load_config(section.path)
    try:
        check_attention(config, section.attention)
        device = device or torch.device("cpu")
        section = section.model_copy(update={"attention": choose_attention(section, config, device)[0]})
        _without_dropout(config, section.path)
        model = _streamed(section, config, partitioner) if partitioner else None
        if model is None:
            model = _whole(section, config, device)
    except _UNFIT as error:
        raise ModelError(f"model.path {section.path} is no causal language model: {_short(error)}") from error
    check_layers(model, section.path)
    if section.quantisation:
        keep_layout(model)
    model.config.use_cache = False
    # The first layer's input must require a gradient: see ZeroEngine.
    model.enable_input_require_grads()
    if activation_checkpointing:
        # The reentrant kind runs backward hooks unevenly under ZeRO-3.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _streamed(
    section: ModelSection, config: PreTrainedConfig, partitioner: Partitioner
) -> PreTrainedModel | None:
    """Return None where transformers' own loading is needed, and log why."""
    try:
        dtype = DTYPES[section.dtype]
        quantisation = quantisation_config(section, dtype)
        folder = fetch_model(section.path)
        return load_streamed(folder, config, dtype, section.attention, partitioner, quantisation)
    except NotStreamableError as reason:
        logger.warning("model.path %s is loaded whole by every process: %s", section.path, reason)
        return None


def _whole(section: ModelSection, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    dtype = DTYPES[section.dtype]
    quantisation = quantisation_config(section, dtype)
    found = auto_class(config).from_pretrained(
        section.path,
        config=config,
        trust_remote_code=False,
        dtype=dtype,
        attn_implementation=section.attention,
        output_loading_info=True,
        # DeepSpeed moves the model, unless it is quantised, which happens where it is meant to be.
        **({"quantization_config": quantisation, "device_map": {"": device}} if quantisation else {}),
    )
    model: PreTrainedModel = found[0]
    if missing := sorted(found[1]["missing_keys"]):
        raise ModelError(
            f"model.path {section.path} lacks {len(missing)} weights, the first {missing[0]}: give a whole model"
        )
    return model


def model_without_weights(path: str) -> PreTrainedModel:
    """Return the model on the meta device, from its configuration alone.

    Raises:
        ModelError: there is no causal language model there.
    """
    config = load_config(path)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
    except _UNFIT as error:
        raise ModelError(f"model.path {path} is no causal language model: {_short(error)}") from error
    check_layers(model, path)
    return model


def _without_dropout(config: PreTrainedConfig, path: str) -> None:
    decoder = config.get_text_config()
    found = {name: value for name, value in vars(decoder).items() if "drop" in name or "jitter" in name}
    names = [name for name, value in found.items() if isinstance(value, float) and value > 0]
    for name in names:
        setattr(decoder, name, 0.0)
    if names:
        logger.warning("model.path %s: %s of its config is set to 0 for training", path, ", ".join(names))


def adapt(
    model: PreTrainedModel,
    recipe: Recipe,
    restored: Iterable[tuple[str, Mapping[str, Tensor]]] = (),
    initial_ranks: Mapping[str, int] | None = None,
) -> dict[str, AdaptedModule]:
    """Freeze the model and inject the recipe's adapter; return the adapted modules by full name.

    Args:
        model: the base.
        recipe: of the run.
        restored: (module, {factor or vector: weights}) that take the place of initial values.
        initial_ranks: of a run that is resumed, by module; None is a run that begins.

    Raises:
        RecipeError, RunError: ranks or adapter.init_from do not fit the model or the method.
    """
    section, resumes = recipe.adapter, initial_ranks is not None
    method = method_class(recipe.method)
    splits = head_splits(model.config.get_text_config()) if method.per_head else {}
    linears = find_linears(model, section.targets, text_decoder(model), section.layers, section.rank)
    logger.info("adapters in %s", describe_targets(model, linears))
    # qwen2_moe itself is not on PEFT's list of models that are like qwen2_moe.
    if model.config.model_type != "qwen2_moe" and (lost := lost_in_peft(model, linears)):
        logger.warning(
            "PEFT 0.21 takes %s and %d more for experts and would load the adapter without them: merge it instead",
            lost[0],
            len(lost) - 1,
        )
    ranks = ranks_of_linears(section, linears, method.least_rank)
    modules = inject(
        model,
        linears,
        section.rank,
        recipe.scale,
        method.init,
        recipe.train.seed,
        splits,
        ranks,
        section.variant,
        torch.float32 if section.dtype == "fp32" else None,
    )
    magnitudes: Mapping[str, Tensor] = {}
    starting = section.init_from is not None and initial_ranks is None
    if section.init_from is not None and initial_ranks is None:
        with StartingAdapter(Path(section.init_from), section, linears) as start:
            restored = list(start.factors(modules, method.factors))
            magnitudes = start.magnitudes()
        initial_ranks = {name: len(factors["lora_A"]) for name, factors in restored}
    for name, module in modules.items():
        module.initial_rank = (initial_ranks or {}).get(name, module.initial_rank)
        module.max_rank = section.largest_rank(module.in_features, module.out_features)
    given = set()
    for name, factors in restored:
        _refuse_unlike(name, factors, modules, method.factors)
        modules[name].set_factors(factors)
        modules[name].set_vectors(factors)
        given.add(name)
    if starting:
        begin_magnitudes(modules, magnitudes)
    if resumes and given != set(modules):
        raise RunError(f"the checkpoint lacks {min(set(modules) - given)}, an adapted module of this run")
    return modules


def _refuse_unlike(
    name: str,
    factors: Mapping[str, Tensor],
    modules: Mapping[str, AdaptedModule],
    of_method: Sequence[str],
) -> None:
    """Refuse restored factors that the module of this name cannot have.

    Raises:
        RunError: with what is saved.
    """
    module = modules.get(name)
    if module is None:
        raise RunError(f"factors were saved for {name}, which is no adapted module of this run")
    sides = {"lora_A": module.in_features, "lora_B": module.out_features}
    saved = {factor: factors[factor].shape[1] for factor in factors if factor in sides}
    if saved and (set(factors).difference(VECTORS) != set(of_method) or saved != sides):
        raise RunError(f"the factors saved for {name} have rows of {saved}; those of this run have {sides}")


def _short(error: Exception) -> str:
    """Return the beginning of a message as one line: the first of transformers' lines often says nothing yet."""
    return textwrap.shorten(str(error), 240, placeholder=" ...")
