"""Whether a checkpoint holds what a run writes: whoever changes its files can change their sums too.

Nothing in a checkpoint is ever executed: it is JSON and numbers, read by `dynrank_ds.tensorfile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from dynrank_ds.adapters.linear import FACTORS, VECTORS
from dynrank_ds.checkpoint.files import STATE, TENSORS
from dynrank_ds.checkpoint.keys import (
    CONSTANT,
    MASTER,
    PARTIAL,
    REPLICATED,
    factor_key,
    factor_shape,
    vector_shape,
)
from dynrank_ds.errors import RunError
from dynrank_ds.ranking.layout import ModuleShape
from dynrank_ds.tensorfile import TensorFileReader
from dynrank_ds.zero.shards import MOMENTS

_PIECE = 2**20


class _Section(BaseModel):
    """Keys that are not named here are left to who reads them; a number is a number, not text of one."""

    model_config = ConfigDict(strict=True)


class _Part(_Section):
    linear: str
    side: Literal["columns", "rows"]
    start: int = Field(ge=0)
    stop: int = Field(ge=0)
    of: int = Field(ge=1)


class _Module(_Section):
    rank: int = Field(ge=0)
    initial_rank: int = Field(default=0, ge=0)
    scale: FiniteFloat
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    births: list[int]
    gate: list[FiniteFloat] | None = None
    part: _Part | None = None


class _State(_Section):
    step: int = Field(ge=0)
    batch: int = Field(ge=0)
    method: str
    base_model: str
    recipe: dict[str, dict[str, Any]]
    identity: dict[str, str]
    blocks: dict[str, _Module]
    held_out_loss: FiniteFloat | None = None


def check_content(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Check that state.json has its keys and types, and that the tensors have the shapes that it says and are finite.

    Raises:
        RunError, TensorFileError: with what is wrong.
    """
    try:
        checked = _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RunError(f"{checkpoint / STATE} is not what a run writes: {key}: {first['msg']}") from error
    if not checkpoint.name.endswith(f"-{checked.step}"):
        raise RunError(f"{checkpoint / STATE} is not what a run writes: step is {checked.step}")
    for name, module in checked.blocks.items():
        lengths = {"births": module.births, "gate": module.gate}
        for key, values in lengths.items():
            if values is not None and len(values) != module.rank:
                raise RunError(
                    f"{checkpoint / STATE} is not what a run writes: {name} has rank {module.rank} and "
                    f"{len(values)} numbers of {key}"
                )
    with TensorFileReader(checkpoint / TENSORS) as file:
        _check_names_and_shapes(checkpoint / TENSORS, file, checked.blocks)
        _check_finite(checkpoint / TENSORS, file)


def _check_names_and_shapes(path: Path, file: TensorFileReader, modules: Mapping[str, _Module]) -> None:
    for name, entry in file.entries.items():
        kind, _, rest = name.partition("/")
        if kind in (PARTIAL, CONSTANT, REPLICATED):
            continue
        of, _, factor = rest.rpartition(".")
        if of not in modules or factor not in (*FACTORS, *VECTORS):
            raise RunError(f"{path} holds {name}, which is of no module of {STATE}")
        module = modules[of]
        sides = ModuleShape(of, module.in_features, module.out_features)
        is_vector = factor in VECTORS
        shape = vector_shape(factor, sides) if is_vector else factor_shape(factor, module.rank, sides)
        if entry.shape != shape or entry.dtype != torch.float32:
            raise RunError(
                f"{path}: {name} is {entry.dtype} {entry.shape}; {STATE} says torch.float32 {shape}"
            )
    for of, module in modules.items():
        factors = [f for f in FACTORS if f != "lora_E" or factor_key(MASTER, of, f) in file.entries]
        for state in (MASTER, *MOMENTS):
            for factor in factors if module.rank else []:
                if factor_key(state, of, factor) not in file.entries:
                    raise RunError(f"{path} lacks {factor_key(state, of, factor)}")


def _check_finite(path: Path, file: TensorFileReader) -> None:
    for name, entry in file.entries.items():
        numel = entry.nbytes // entry.dtype.itemsize
        for start in range(0, numel, _PIECE) if entry.dtype.is_floating_point else []:
            if not torch.isfinite(file.read_part(name, start, min(numel, start + _PIECE))).all():
                raise RunError(f"{path}: {name} has values that are not finite: remove this checkpoint")
