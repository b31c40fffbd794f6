"""A base in NF4 by bitsandbytes: how its layers are quantised, and kept so."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from dynrank_ds.errors import ModelError
from dynrank_ds.quantised_layers import check_packages, linears_to_quantise, quantised_linears
from dynrank_ds.recipe_sections import ModelSection


def quantisation_config(section: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return transformers' configuration; None for a base that is not quantised.

    Packed weights are stored as `dtype`: ZeRO partitions parameters of one dtype, and casts others to it.

    Raises:
        MachineError: a package is missing.
    """
    if section.quantisation is None:
        return None
    check_packages(f"model.quantisation {section.quantisation}")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantisation,
        bnb_4bit_use_double_quant=section.double_quantisation,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def check_quantisable(section: ModelSection, model: PreTrainedModel) -> None:
    """Refuse a quantisation that would leave the base as it is.

    Raises:
        ModelError: its layers are of a class of its own, which transformers does not replace.
    """
    if section.quantisation and not linears_to_quantise(model):
        raise ModelError(
            f"model.path {section.path} is a {model.config.model_type} model, none of whose layers transformers "
            "quantises: leave out model.quantisation"
        )


def constant_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the scales of all 4-bit weights, which every process holds whole."""
    states: list[Any] = [linear.quant_state for linear in quantised_linears(model).values()]
    return sum(s.absmax.nbytes + (s.state2.absmax.nbytes if s.nested else 0) for s in states)


def keep_layout(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on CPUs with AVX512-BF16 from rearranging their weights at the first evaluation.

    They would stay rearranged: in training most gradients would be None, and the loss still right.
    """
    for linear in quantised_linears(model).values():
        linear.support_avx512bf16_for_cpu = False
