"""Counts the collectives of this process, whoever issues them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

_KINDS = ("reduce", "gather", "scatter", "broadcast", "alltoall", "barrier")
_METHODS = [name for name in dir(dist.ProcessGroup) if any(kind in name for kind in _KINDS)]


class Collectives:
    """What reached the process groups of this process since `counting` was entered."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """By the name of the process group's method."""
        self.bytes = 0
        """Of the tensors that results are written to: of an all-gather the whole output."""

    @contextmanager
    def counting(self) -> Iterator[Collectives]:
        """Count while the `with` block runs."""
        with ExitStack() as patches:
            for name in _METHODS:
                method = getattr(dist.ProcessGroup, name)
                patches.enter_context(patch.object(dist.ProcessGroup, name, self._noting(name, method)))
            yield self

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(group: Any, *arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            self.bytes += sum(tensor.nbytes for tensor in _tensors(arguments[:1]))
            return method(group, *arguments, **options)

        return noted


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in nested lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
