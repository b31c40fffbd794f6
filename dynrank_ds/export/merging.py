"""The sums of a base's weights with an adapter's updates, some rows at a time, in place or one tensor after another."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dynrank_ds.base_weights import BaseWeights
from dynrank_ds.errors import RunError
from dynrank_ds.export.base_model import BaseModel
from dynrank_ds.export.nf4_base import Nf4Settings, Nf4Weight
from dynrank_ds.export.peft_adapter import PeftAdapter
from dynrank_ds.tensorfile import TensorFileReader, TensorFileWriter

logger = logging.getLogger(__name__)

# Elements whose fp32 copies exist at one time, half a MiB: they stay in the cache of one core. Each worker is one
# thread: several on one piece mostly wait for each other.
_ELEMENTS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Nf4Base:
    """A base as training in NF4 had it."""

    settings: Nf4Settings
    modules: frozenset[str]
    """Names of the quantised layers."""


class _Memory:
    """Pieces of memory that tensors use one after another: new memory for each costs more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def tensor(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor without values, where the last one of the same use was."""
        needed = math.prod(shape) * dtype.itemsize
        if use not in self._held or self._held[use].numel() < needed:
            self._held.pop(use, None)  # given back before more is asked for
            self._held[use] = torch.empty(needed, dtype=torch.uint8)
        return self._held[use][:needed].view(dtype).view(*shape)


class _Sum:
    """One weight (out, in) with what an adapter does to it."""

    def __init__(
        self, weight: Tensor, module: str, adapter: PeftAdapter, nf4: Nf4Base | None, memory: _Memory
    ) -> None:
        adapted = module in adapter.modules
        self._weight = weight
        self._update = adapter.update(module) if adapted else None
        self._magnitudes = adapter.magnitudes(module) if adapted and adapter.weight_decomposed else None
        self._packed = Nf4Weight(weight, nf4.settings) if nf4 and module in nf4.modules else None
        self._at_once = min(len(weight), max(1, _ELEMENTS_AT_ONCE // weight.shape[1]))
        self._scratch = memory.tensor("sums", (self._at_once, weight.shape[1]), torch.float32)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, their sum in fp32), which is valid until the next one."""
        for start in range(0, len(self._weight), self._at_once):
            rows = slice(start, min(start + self._at_once, len(self._weight)))
            summed = self._scratch[: rows.stop - rows.start]
            summed.copy_(self._packed.rows(rows.start, rows.stop) if self._packed else self._weight[rows])
            if self._update is not None:
                summed.addmm_(self._update.b[rows], self._update.a, alpha=self._update.scale)
            if self._magnitudes is not None:
                norms = torch.linalg.vector_norm(summed, dim=1, keepdim=True)
                summed.mul_(torch.where(norms > 0, self._magnitudes[rows, None] / norms, 1))
            yield rows, summed


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads compute by themselves."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


class Merge:
    """Which stored tensors of a base an adapter changes.

    Args:
        adapter: its folder.
        model: the base.
        modules: the module of each stored tensor, by its stored name.
        nf4: take quantised layers as training had them; None takes them as they are stored.
    """

    def __init__(
        self, adapter: Path, model: BaseModel, modules: Mapping[str, str], nf4: Nf4Base | None
    ) -> None:
        self.adapter, self.model, self._modules, self._nf4 = adapter, model, modules, nf4

    def write(self, folder: Path, workers: int) -> None:
        """Write the merged copies of all files of the base.

        Raises:
            RunError: no weight changes.
        """
        shards = self.model.shards
        total = sum((self.model.folder / shard).stat().st_size for shard in shards)
        with (
            tqdm(total=total, desc="merge", unit="B", unit_scale=True) as bar,
            _one_thread_each(workers) as pool,
        ):
            futures = [pool.submit(self.write_file, shard, folder, bar) for shard in shards]
            try:
                changed = sum(future.result() for future in futures)
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, files not begun are left out
        if changed == 0:
            raise RunError(
                f"No weight of {self.model.folder} changes at its precision: the adapter changes nothing"
            )
        logger.info("merged: %d modules changed their weight", changed)

    def write_file(self, shard: str, folder: Path, bar: tqdm[Any]) -> int:
        """Write the merged copy of one file; return how many of its adapted tensors differ from the base's."""
        changed, memory = 0, _Memory()
        with (
            PeftAdapter(self.adapter) as adapter,
            TensorFileReader(self.model.folder / shard) as reader,
            TensorFileWriter(folder / shard, list(reader.entries.values()), reader.metadata) as writer,
        ):
            for entry in reader.entries.values():
                if self.changes(entry.name, adapter):
                    weight = memory.tensor("weight", entry.shape, entry.dtype)
                    reader.read_into(entry.name, 0, weight.view(-1))
                    changed += self._merge(entry.name, weight, adapter, memory)
                    writer.write(entry.name, weight)
                else:
                    writer.copy(entry.name, reader)
                bar.update(entry.nbytes)
        return changed

    def changes(self, name: str, adapter: PeftAdapter) -> bool:
        """Return whether a stored tensor is another one once it is merged."""
        module = self._modules[name]
        return module in adapter.modules or (self._nf4 is not None and module in self._nf4.modules)

    def sum(self, name: str, weight: Tensor, adapter: PeftAdapter, memory: _Memory) -> _Sum:
        """Return the sum of a stored tensor that changes."""
        return _Sum(weight, self._modules[name], adapter, self._nf4, memory)

    def _merge(self, name: str, weight: Tensor, adapter: PeftAdapter, memory: _Memory) -> bool:
        """Put the sum of a stored tensor in its place; return whether an adapter changed a value."""
        changed = False
        for rows, summed in self.sum(name, weight, adapter, memory).pieces():
            changed = changed or _differs(summed, weight[rows])
            weight[rows] = summed
        return changed and self._modules[name] in adapter.modules


def _differs(summed: Tensor, weight: Tensor) -> bool:
    """Return whether some value of a weight is another one; that is mostly seen in its first row."""
    parts = (slice(0, 1), slice(1, None))
    return any(not torch.equal(summed[rows].to(weight.dtype), weight[rows]) for rows in parts)


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a model folder by their stored names, read when they are asked for."""

    def __init__(self, weights: BaseWeights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        entry = self._weights.entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self._weights.read_into(name, 0, out.view(-1))
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.entries)

    def __len__(self) -> int:
        return len(self._weights.entries)


class MergedWeights(Mapping[str, Tensor]):
    """The tensors of a merged model in fp32, where nothing is rounded to the dtype of the base's files."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self._files = BaseWeights(merge.model.folder)
        self._base = StoredWeights(self._files)
        self._adapter = PeftAdapter(merge.adapter)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        if not self._merge.changes(name, self._adapter):
            return weight
        merged = torch.empty(weight.shape)
        for rows, summed in self._merge.sum(name, weight, self._adapter, _Memory()).pieces():
            merged[rows] = summed
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
        self._adapter.__exit__(kind, error, trace)
