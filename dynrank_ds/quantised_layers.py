"""Which layers of a model bitsandbytes quantises."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dynrank_ds.errors import MachineError

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from torch import nn
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

    replace_with_bnb_linear(model, modules_to_not_convert=_kept(model), quantization_config=config)
    return quantised_linears(model)


def linears_to_quantise(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the layers that `replace_linears` would replace, by name; bitsandbytes need not be installed."""
    from torch import nn
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = _kept(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, kept)
    }


def _kept(model: PreTrainedModel) -> Any:
    """Return the names of modules that transformers does not quantise, the output layer among them."""
    from transformers.quantizers.base import HfQuantizer

    return HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
