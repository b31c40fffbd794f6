"""The sides of a model that decide what training it costs, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.adapters.pissa import PissaLinear
from dynrank_ds.errors import ModelError
from dynrank_ds.quantised_layers import linears_to_quantise
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.architecture import decoder_layers
from dynrank_ds.training.model import adapt, model_without_weights

ITEM = {"bf16": 2, "fp32": 4}
"""Bytes of an element of model.dtype."""

_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
BUILT_IN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {},  # the defaults of transformers' LlamaConfig
    "meta-llama/Llama-2-13b-hf": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "meta-llama/Llama-2-70b-hf": _70B,
    "meta-llama/Meta-Llama-3-8B": {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    },
    "meta-llama/Meta-Llama-3-70B": _70B | {"vocab_size": 128256},
    "meta-llama/Llama-3.1-70B": _70B | {"vocab_size": 128256},
}
"""Published configurations, as far as they decide sizes: these models are planned without a download."""


@dataclass(frozen=True)
class Unit:
    """A module whose parameters ZeRO-3 gathers together."""

    name: str
    parameters: tuple[int, ...]
    """Elements of each of its own as it is held (`Packed`), in the order in which they are gathered."""
    whole_layer: bool = False
    """Whether it is a decoder layer, gathered with all modules in it."""

    @property
    def elements(self) -> int:
        return sum(self.parameters)


@dataclass(frozen=True)
class Packed:
    """What of the base is held in 4 bits; everything zero where nothing is."""

    weights: int = 0
    """Weights of the quantised layers."""
    elements: int = 0
    """Elements of the model's dtype that they are packed into: ZeRO takes parameters of one dtype."""
    constants: int = 0
    """Bytes of their scales, which every process holds whole."""
    largest: int = 0
    """Weights of the largest of these layers, which is unpacked for each use."""


@dataclass(frozen=True)
class Architecture:
    """A decoder with its adapter."""

    units: tuple[Unit, ...]
    """In the order of the forward: embedding, layers, what is between the last layer and the head, head."""
    modules: dict[str, AdaptedModule]
    """Adapted modules without weights."""
    base_parameters: int
    """All that are frozen, PiSSA's initial triples too."""
    packed: Packed
    trainable_parameters: int
    decomposed_width: int
    """Output features of a layer's weight-decomposed linears together, whose outputs autograd keeps once more."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    query_width: int
    """Heads times their size."""
    key_width: int
    """Key/value heads times their size."""
    vocabulary: int
    tied: bool
    """Whether the head's weights are the embedding's."""

    @property
    def held_elements(self) -> int:
        """Of the base, as elements of the model's dtype."""
        return self.base_parameters - self.packed.weights + self.packed.elements


def describe(recipe: Recipe) -> Architecture:
    """Return the architecture of a recipe's model with the recipe's adapter in it.

    Raises:
        ModelError: there is no configuration of a causal language model, or it lacks the sides of a decoder layer.
    """
    model = _model(recipe.model.path)
    quantised = _quantised(model, recipe)
    modules = adapt(model, recipe)
    for module in modules.values():
        if isinstance(module, PissaLinear):
            module.set_initial(module.factors(), range(module.initial_rank))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    config = model.config.get_text_config()
    needed = ("hidden_size", "intermediate_size", "num_attention_heads")
    if lacking := [name for name in needed if not isinstance(getattr(config, name, None), int)]:
        raise ModelError(
            f"model.path {recipe.model.path}: its config.json has no number {lacking[0]}, so that its activations "
            "cannot be planned"
        )
    heads: int = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    item = ITEM.get(recipe.model.dtype, 2)
    units = _units(model, {id(weight): weight.numel() // (2 * item) for weight in quantised})
    layers = sum(unit.whole_layer for unit in units)
    return Architecture(
        units=units,
        modules=modules,
        base_parameters=frozen,
        packed=_packed([weight.numel() for weight in quantised], item, recipe.model.double_quantisation),
        trainable_parameters=sum(
            p.numel() for m in modules.values() for p in (*m.factors().values(), *m.vectors().values())
        ),
        decomposed_width=-(-sum(m.out_features for m in modules.values() if m.vectors()) // layers),
        layers=layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        query_width=heads * head_dim,
        key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=config.vocab_size,
        tied=_weight(model.get_output_embeddings()) is _weight(model.get_input_embeddings()),
    )


def _model(path: str) -> PreTrainedModel:
    if path in BUILT_IN and not Path(path).is_dir():
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**BUILT_IN[path]))
        return model
    return model_without_weights(path)


def _quantised(model: PreTrainedModel, recipe: Recipe) -> list[Tensor]:
    if recipe.model.quantisation is None:
        return []
    return [linear.weight for linear in linears_to_quantise(model).values()]


def _packed(weights: Sequence[int], item: int, double: bool) -> Packed:
    """Return what NF4 makes of layers: a scale for 64 weights, in fp32, or in 8 bits with another for 256 scales."""
    blocks = [-(-n // 64) for n in weights]
    constants = sum(n + 4 * -(-n // 256) if double else 4 * n for n in blocks)
    return Packed(sum(weights), sum(n // (2 * item) for n in weights), constants, max(weights, default=0))


def _units(model: PreTrainedModel, packed: Mapping[int, int]) -> tuple[Unit, ...]:
    """`packed` has the elements of packed weights, by the identity of the weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = decoder_layers(model)
    # Parameters of the base are gathered before those of the adapters, which are made later.
    inside = [sorted(layer.parameters(), key=lambda p: p.requires_grad) for layer in layers]
    known = {id(p) for layer in inside for p in layer} | {id(_weight(embedding)), id(_weight(head))}
    rest = tuple(p.numel() for p in model.parameters() if id(p) not in known)
    held = [tuple(packed.get(id(p), p.numel()) for p in layer) for layer in inside]
    return (
        Unit("embedding", (_weight(embedding).numel(),)),
        *(Unit(f"layer {i}", layer, True) for i, layer in enumerate(held)),
        Unit("norm", rest),
        Unit("head", (_weight(head).numel(),)),
    )


def _weight(module: nn.Module | None) -> nn.Parameter:
    assert module is not None and isinstance(module.weight, nn.Parameter)
    return module.weight
