"""The weights of a Hugging Face model folder: its safetensors files, and any part of any of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dynrank_ds.errors import ModelError
from dynrank_ds.files import read_json
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SCRATCH_BYTES = 1 << 25


def weight_files(folder: Path) -> list[str]:
    """Return the names of the model's safetensors files.

    Raises:
        ModelError: there are none, or the index names one that is not there.
    """
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        raise ModelError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}: only safetensors weights are read")
    names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index} names the file {name}, which is not in {folder}")
    return names


def has_weight_files(folder: Path) -> bool:
    """Return whether the model's weights are safetensors files, whole or not."""
    return (folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file()


class BaseWeights:
    """All tensors of a model folder, by their stored names; no page of a file is ever mapped.

    Raises:
        ModelError: as `weight_files`.
        TensorFileError: a file is missing, cut short or malformed.
    """

    def __init__(self, folder: Path) -> None:
        self._readers: list[TensorFileReader] = []
        self.entries: dict[str, TensorEntry] = {}
        self._reader_of: dict[str, TensorFileReader] = {}
        # One for all reads: of many, freed between lasting allocations, the C library gives little memory back.
        self._scratch = torch.empty(0, dtype=torch.uint8)
        for file in weight_files(folder):
            reader = TensorFileReader(folder / file)
            self._readers.append(reader)
            self.entries |= reader.entries
            self._reader_of |= dict.fromkeys(reader.entries, reader)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` (n,), on any device, with elements [start, start + n) of a tensor, converted to its dtype."""
        stored = self.entries[name].dtype
        if out.device.type == "cpu" and out.dtype == stored:
            self._reader_of[name].read_into(name, start, out)
            return
        if not self._scratch.numel():
            self._scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8)
        step = _SCRATCH_BYTES // stored.itemsize
        for at in range(0, len(out), step):
            piece = out[at : at + step]
            read = self._scratch.view(stored)[: len(piece)]
            self._reader_of[name].read_into(name, start + at, read)
            piece.copy_(read)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> BaseWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LoadedName(NamedTuple):
    """What transformers makes of a stored tensor."""

    name: str
    """In the model."""
    converted: bool
    """Whether the tensor itself is changed on loading: merged with others, cut, or transposed."""


def loaded_names(model: PreTrainedModel, stored: Sequence[str]) -> dict[str, LoadedName]:
    """Return what transformers makes of each stored tensor of `model`, which may be on the meta device."""
    # transformers takes seconds to import, and most users of this module do not need it.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    # In this order, for some rules hold only once another has.
    for name in sorted(stored, key=dot_natural_key):
        loaded, converter = rename_source_key(name, renamings, converters, prefix, known)
        if loaded not in known and name in known:
            loaded, converter = rename_source_key(name, [], [], prefix, known)
        found[name] = LoadedName(loaded, converter is not None)
    return found
