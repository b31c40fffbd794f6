"""How far the logits of two sets of weights of one model are apart, with one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynrank_ds.export.base_model import model_without_weights

_SAMPLES, _TOKENS = 2, 32


class ProbeError(Exception):
    """A model whose weights cannot be given to it one by one, with the reason."""


@dataclass(frozen=True)
class Difference:
    """Of logits on the probe batch, computed in fp32."""

    largest: float
    """Largest magnitude of a difference."""
    logits: float
    """Largest magnitude of a logit, to compare it with."""

    def __str__(self) -> str:
        return f"{self.largest:.3g}, of logits up to {self.logits:.3g} ({_SAMPLES} samples of {_TOKENS} drawn tokens)"


def logit_difference(
    folder: Path, names: Mapping[str, str], left: Mapping[str, Tensor], right: Mapping[str, Tensor]
) -> Difference:
    """Return how far apart the logits of two sets of weights are, on tokens drawn with a fixed seed.

    Args:
        folder: of the model's configuration.
        names: what transformers calls each stored tensor, by its stored name.
        left, right: stored tensors by their stored names, read when they are asked for.

    Raises:
        ProbeError: transformers makes parameters of this model out of several stored tensors.
    """
    first, second = (_logits(folder, names, weights) for weights in (left, right))
    return Difference(float((first - second).abs().max()), float(first.abs().max()))


class _ByParameter(Mapping[str, Tensor]):
    """Stored tensors in fp32 by the names of a model's parameters."""

    def __init__(self, stored_name: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
        self._stored_name, self._weights = stored_name, weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._stored_name[name]].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_name)

    def __len__(self) -> int:
        return len(self._stored_name)


@torch.no_grad()
def _logits(folder: Path, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> Tensor:
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    with init_empty_weights(include_buffers=False):
        model = model_without_weights(folder, device=None).float().eval()
    model.tie_weights()
    stored_name = {loaded: stored for stored, loaded in names.items()}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for together in tied.values():
        there = [name for name in together if name in stored_name]
        if not there:
            raise ProbeError(f"{together[0]} is not stored as one tensor")
        stored_name |= dict.fromkeys(together, stored_name[there[0]])
    drawn = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (_SAMPLES, _TOKENS), generator=drawn)
    attach_align_device_hook(
        model,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=_ByParameter(stored_name, weights),
        # Some layers read the weights of modules in them without calling these.
        preload_module_classes=list(model._no_split_modules or ()),
    )
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
