"""What kind of model a folder holds: which are refused, and where a model's text decoder and its layers are."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from dynrank_ds.adapters.targets import TextDecoder
from dynrank_ds.errors import ModelError


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class of transformers that makes the model: a composite one (images and text) has its own."""
    return (
        AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    )


def check_config(config: PreTrainedConfig, path: str) -> None:
    """Refuse a model that cannot be trained, as far as its configuration shows.

    Raises:
        ModelError: it is quantised, an encoder, an encoder-decoder, or has no language-modelling head.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise ModelError(
            f"model.path {path} is quantised ({settings.get('quant_method', 'of unknown method')}): "
            "give the 16-bit or 32-bit model that it was made from"
        )
    kind = config.model_type
    if config.is_encoder_decoder:
        what = "an encoder-decoder (sequence-to-sequence) model"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "an encoder, whose tokens see those behind them"
    elif not any(
        type(config) in mapping
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    ):
        what = "of a kind for which transformers has no causal language model"
    else:
        return
    raise ModelError(f"model.path {path} is no causal language model: {kind} is {what}")


def check_layers(model: PreTrainedModel, path: str) -> None:
    """Refuse a model whose layers are no `nn.Linear`, or are not found.

    Raises:
        ModelError: with what its layers are.
    """
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise ModelError(
            f"model.path {path} is a {model.config.model_type} model, whose layers are transformers' Conv1D "
            "(weights stored transposed), not nn.Linear: adapters cannot go there"
        )
    if find_decoder_layers(model) is None:
        raise ModelError(
            f"model.path {path} is a {model.config.model_type} model, whose decoder layers are not found: "
            "it has no list of them"
        )


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Return the layers of the text decoder: the longest list of modules that is in no other (lists of experts are)."""
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{o}.") for o in outermost):
            outermost[name] = module
    return max(outermost.items(), key=lambda item: len(item[1]), default=None)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of the text decoder of a model that `check_layers` let through."""
    found = find_decoder_layers(model)
    assert found is not None
    return found[1]


def text_decoder(model: PreTrainedModel) -> TextDecoder:
    """Return where adapters may go in a model that `check_layers` let through."""
    found = find_decoder_layers(model)
    assert found is not None
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    return TextDecoder(
        names[decoder],
        f"{names[decoder]}.{found[0]}",
        len(found[1]),
        names[head] if head is not None else None,
    )
