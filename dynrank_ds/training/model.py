"""The frozen base model, its tokenizer, and the loss around it."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynrank_ds.errors import ModelError
from dynrank_ds.recipe import ModelSection

logger = logging.getLogger(__name__)

_UNFIT = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers raises of a folder that it cannot load."""
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_model_folder(path: str) -> None:
    """Refuses a path that looks like a folder and is none, or holds no model; hub ids pass.

    Raises:
        ModelError: with what to give instead.
    """
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ModelError(f"model.path {path} does not exist: give a model folder or a hub id")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"model.path {path} has no config.json: give the folder of a Hugging Face model")


def fetch_model(path: str) -> Path:
    """The model's folder; a hub id is downloaded into the hub's cache first: weights, configuration, tokenizer.

    Raises:
        ModelError: there is no model there, or the hub cannot be reached.
    """
    check_model_folder(path)
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = Path(snapshot_download(path, allow_patterns=_MODEL_FILES))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path} cannot be fetched from the hub: {_short(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model.path {path} has no safetensors weights: name a model that has them")
    return folder


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: there is no model there, or it has no tokenizer.
    """
    check_model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path {path} holds no tokenizer that transformers can load: {_short(error)}"
        ) from error


def load_model(section: ModelSection, activation_checkpointing: bool) -> PreTrainedModel:
    """The base model in training mode, no cache and no dropout: losses are functions of weights and data alone.

    Raises:
        ModelError: there is no causal language model there, or not all of its weights.
    """
    check_model_folder(section.path)
    try:
        config = AutoConfig.from_pretrained(section.path)
        _without_dropout(config, section.path)
        found: Any = AutoModelForCausalLM.from_pretrained(
            section.path,
            config=config,
            dtype=DTYPES[section.dtype],
            attn_implementation=section.attention,
            output_loading_info=True,
        )
    except _UNFIT as error:
        raise ModelError(f"model.path {section.path} is no causal language model: {_short(error)}") from error
    model: PreTrainedModel = found[0]
    if missing := sorted(found[1]["missing_keys"]):
        raise ModelError(
            f"model.path {section.path} lacks {len(missing)} weights, the first {missing[0]}: give a whole model"
        )
    for key, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0)):
        if getattr(model.config, key, neutral) != neutral:
            raise ModelError(
                f"model.path {section.path} has {key}: models that change their logits are not supported"
            )
    model.config.use_cache = False
    # The first layer's input must require a gradient: see ZeroEngine.
    model.enable_input_require_grads()
    if activation_checkpointing:
        # The reentrant kind runs backward hooks unevenly under ZeRO-3.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def model_without_weights(path: str) -> PreTrainedModel:
    """The model on the meta device, from its configuration alone.

    Raises:
        ModelError: there is no causal language model there.
    """
    check_model_folder(path)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except _UNFIT as error:
        raise ModelError(f"model.path {path} is no causal language model: {_short(error)}") from error


def _without_dropout(config: PreTrainedConfig, path: str) -> None:
    decoder = config.get_text_config()
    found = {name: value for name, value in vars(decoder).items() if "drop" in name or "jitter" in name}
    names = [name for name, value in found.items() if isinstance(value, float) and value > 0]
    for name in names:
        setattr(decoder, name, 0.0)
    if names:
        logger.warning("model.path %s: %s of its config is set to 0 for training", path, ", ".join(names))


class SummedLoss(nn.Module):
    """Cross entropy (fp32) summed over the targets of a micro-batch, fp64; whoever calls it knows what to divide by.

    Padding is on the right, so under causal attention no token ever sees it and no mask is needed. Where samples are
    packed into one row, their position ids restart: transformers then calls FlashAttention's kernel for samples of
    unequal lengths, or with other attentions masks all but each sample's own tokens.
    Logits are made only where there is a target: they are the largest tensors of a step.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids (samples, tokens); positions (n,), flat, of the tokens that predict; targets (n,); all int64.

        position_ids (1, tokens): for packed samples, counted from 0 in each.
        """
        hidden = self.model.get_decoder()(input_ids=input_ids, position_ids=position_ids).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[positions])
        # Summed in fp64: in fp32 the sum over a long batch is off by more than 1e-6 of its mean.
        return F.cross_entropy(logits.float(), targets, reduction="none").double().sum()


def _short(error: Exception) -> str:
    """The beginning of a message, in one line: transformers' first lines often end before they say anything."""
    return textwrap.shorten(str(error), 240, placeholder=" ...")
