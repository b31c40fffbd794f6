"""Which layers of a model bitsandbytes quantises."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dynrank_ds.errors import MachineError

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig, PreTrainedModel


def check_packages(what: str) -> None:
    """Refuse to go on without the packages that quantise.

    Raises:
        MachineError: naming the one that is missing, and what needs it.
    """
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise MachineError(f"{what} needs {package}: pip install {package}")


def quantised_linears(model: PreTrainedModel) -> dict[str, Linear4bit]:
    """Return the 4-bit layers of a model by their full names."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def replace_linears(model: PreTrainedModel, config: BitsAndBytesConfig) -> dict[str, Linear4bit]:
    """Put 4-bit layers without weights in the place of those that transformers would quantise; return them by name."""
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    in_fp32 = list(model._keep_in_fp32_modules or ())
    kept: Any = HfQuantizer.get_modules_to_not_convert(model, None, in_fp32)
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    return quantised_linears(model)
