"""A base in NF4 by bitsandbytes: which of its layers are quantised, and how."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from dynrank_ds.errors import MachineError
from dynrank_ds.recipe import ModelSection

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit


def quantisation_config(section: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return transformers' configuration; None for a base that is not quantised.

    Packed weights are stored as `dtype`: ZeRO partitions parameters of one dtype, and casts others to it.

    Raises:
        MachineError: a package is missing.
    """
    if section.quantisation is None:
        return None
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise MachineError(
                f"model.quantisation {section.quantisation} needs {package}: pip install {package}"
            )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantisation,
        bnb_4bit_use_double_quant=section.double_quantisation,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def quantised_linears(model: PreTrainedModel) -> dict[str, Linear4bit]:
    """Return the 4-bit layers of a model by their full names."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def replace_linears(model: PreTrainedModel, config: BitsAndBytesConfig) -> dict[str, Linear4bit]:
    """Put 4-bit layers without weights in the place of those that transformers would quantise; return them by name."""
    in_fp32 = list(model._keep_in_fp32_modules or ())
    kept: Any = HfQuantizer.get_modules_to_not_convert(model, None, in_fp32)
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    return quantised_linears(model)


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
