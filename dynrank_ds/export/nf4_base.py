"""The base of an adapter that was trained in NF4: which of its weights were rounded, and to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynrank_ds.errors import RunError
from dynrank_ds.export.base_model import BaseModel, model_without_weights
from dynrank_ds.quantised_layers import check_packages, replace_linears

_BLOCK = 64
"""Weights that share a scale; rows of the weight follow one another in blocks."""
_SCALES_IN_A_BLOCK = 256
"""bitsandbytes' own, of double quantisation."""
_WEIGHTS_AT_ONCE = 1 << 20
"""Quantising on a CPU takes some 24 bytes of temporary memory a weight."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Nf4Settings:
    """What the recipe of a training in NF4 said of its base."""

    double: bool
    """Whether scales were quantised too."""
    dtype: torch.dtype
    """Of the model: weights were quantised from it, and dequantised to it."""


def nf4_settings(record: Mapping[str, Any]) -> Nf4Settings | None:
    """Return what the dynrank.json of an adapter says of a base in NF4; None where it was trained on another.

    Raises:
        RunError: it is damaged.
    """
    section = record.get("recipe", {}).get("model", {})
    if section.get("quantisation") is None:
        return None
    if section["quantisation"] != "nf4" or section.get("dtype") not in _DTYPES:
        raise RunError(
            f"dynrank.json says that the adapter was trained on a base in {section['quantisation']!r} with model.dtype "
            f"{section.get('dtype')!r}: known are nf4, and bf16 or fp32"
        )
    return Nf4Settings(bool(section.get("double_quantisation")), _DTYPES[section["dtype"]])


def nf4_modules(model: BaseModel, settings: Nf4Settings) -> frozenset[str]:
    """Return the names of the layers that training quantised.

    Raises:
        MachineError: a package is missing.
        ModelError: transformers knows no such model.
    """
    check_packages("an adapter that was trained in NF4")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return frozenset(replace_linears(model_without_weights(model.folder), config))


class Nf4Weight:
    """One weight (out, in) as training had it, packed, of which rows are dequantised."""

    def __init__(self, weight: Tensor, settings: Nf4Settings) -> None:
        from bitsandbytes.functional import dequantize_blockwise, quantize_4bit, quantize_blockwise

        self._settings, self._shape = settings, weight.shape
        flat = weight.reshape(-1)
        packed, scales = [], []
        for piece in flat.split(_WEIGHTS_AT_ONCE):
            part, state = quantize_4bit(piece.to(settings.dtype), blocksize=_BLOCK, quant_type="nf4")
            packed.append(part.flatten())
            scales.append(state.absmax)
        self._packed, self._scales = torch.cat(packed), torch.cat(scales)
        if settings.double:
            offset = self._scales.mean()
            bits, second = quantize_blockwise(self._scales - offset, blocksize=_SCALES_IN_A_BLOCK)
            self._scales = dequantize_blockwise(bits, second) + offset

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), (n, in) in the dtype that training computed in."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        width = self._shape[1]
        first, last = start * width // _BLOCK, -(-stop * width // _BLOCK)
        begin, end = first * _BLOCK, min(last * _BLOCK, self._shape.numel())
        state = QuantState(
            absmax=self._scales[first:last],
            shape=torch.Size((end - begin,)),
            dtype=self._settings.dtype,
            blocksize=_BLOCK,
            quant_type="nf4",
        )
        out: Tensor = dequantize_4bit(self._packed[begin // 2 : -(-end // 2), None], state)
        return out.flatten()[start * width - begin : stop * width - begin].view(stop - start, width)
