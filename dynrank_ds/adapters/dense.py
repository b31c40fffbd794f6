"""The weight of a frozen linear layer as a matrix, whatever it is stored as."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return the weight (out, in) that the layer multiplies by; of a 4-bit layer a dequantised copy, in its own dtype.

    Under ZeRO-3 the weight must be gathered.
    """
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit  # not needed otherwise

    dense: Tensor = dequantize_4bit(weight.detach().view(-1, 1), state)
    return dense.view(linear.out_features, linear.in_features)
