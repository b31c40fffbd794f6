"""Adapters in the linear layers of a plain module, by the ends of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dynrank_ds.adapters.inject import inject
from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.adapters.targets import TextDecoder, find_linears


def inject_named(
    model: nn.Module, targets: Sequence[str], *arguments: Any, **options: Any
) -> dict[str, AdaptedModule]:
    """`inject` into those of the whole module."""
    return inject(model, find_linears(model, targets, TextDecoder("", "layers", 0)), *arguments, **options)
