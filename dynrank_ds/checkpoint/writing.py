"""Writing a checkpoint.

The adapter is small, so its whole state is written by module, independent of the world size: fp32 weights, moments,
ages and statistics. The frozen base is named, never written. No random state is needed: data order and initial values
are functions of the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrank_ds.adapters.pissa import PissaLinear
from dynrank_ds.checkpoint import files
from dynrank_ds.checkpoint.files import FORMAT, STATE, TENSORS, Progress
from dynrank_ds.checkpoint.initial import INITIAL_OF
from dynrank_ds.checkpoint.keys import (
    MASTER,
    constant_key,
    factor_key,
    factor_shape,
    partial_key,
    replicated_key,
    vector_shape,
)
from dynrank_ds.errors import RunError
from dynrank_ds.files import sync, write_synced
from dynrank_ds.methods.base import Method
from dynrank_ds.shared_disk import Patience
from dynrank_ds.tensorfile import TensorEntry, TensorFileWriter
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine
from dynrank_ds.zero.shards import MOMENTS


def save(
    run: Path,
    progress: Progress,
    engine: ZeroEngine,
    method: Method,
    metadata: Mapping[str, Any],
    kept: int,
    kind: str,
) -> None:
    """Write a checkpoint under a temporary name, rename it, and remove all of its kind but the newest `kept`.

    Every process must call it. metadata: what else state.json holds. kind: STEP or BEST.

    Raises:
        RunError: on every process, if the first one could not write it; earlier checkpoints are undamaged.
    """
    final = files.checkpoint_path(run, kind, progress.step)
    writer = _Writer(final, engine, method) if processes.rank() == 0 else None
    patience = Patience(f"the checkpoint {final} could not be written")
    while True:
        if writer:
            writer.begin()
        _give_states(writer, engine, method)
        if writer:
            writer.attempt(writer.publish, {**asdict(progress), **metadata})
            writer.attempt(lambda: files.remove(files.complete_checkpoints(run, kind)[kept:]))
        error = writer.error if writer else None
        outcome = _WRITTEN if error is None else _AGAIN if patience.is_for(error) else _FAILED
        # This all-reduce also makes every process wait until the checkpoint has its name.
        shared = processes.all_reduce_sum(torch.tensor(outcome, device=engine.layout.device))
        if shared == _WRITTEN:
            break
        if shared == _FAILED:
            raise RunError(
                f"the checkpoint {final} could not be written ({error}); earlier ones are undamaged: "
                "free disk space or repair the disk, then resume with resume=auto"
            ) from error


_WRITTEN, _AGAIN, _FAILED = 0, 1, 2
"""What became of a checkpoint; processes other than the first count 0."""


def _give_states(writer: _Writer | None, engine: ZeroEngine, method: Method) -> None:
    """Gather every state, and give it to the first process's writer; every process must call it."""
    statistics = {name: engine.layout.split(value) for name, value in method.row_statistics.items()}
    states = engine.states() | statistics
    for name, state in states.items():
        for module, factor, rows in engine.whole_rows(state):
            if writer:
                writer.attempt(writer.rows, name, module, factor, rows)
    for statistic, part in method.partial_statistics.items():
        # Each process's part, not their sum: added up in another order, scores would differ in their last bits.
        for process, theirs in enumerate(processes.from_each_process(part)):
            if writer:
                writer.attempt(writer.tensor, partial_key(statistic, process), theirs)
    if writer:
        for key, value in _constants(engine).items():
            writer.attempt(writer.tensor, key, value)
        for name, value in method.replicated_state.items():
            writer.attempt(writer.tensor, replicated_key(name), value)


def _constants(engine: ZeroEngine) -> dict[str, Tensor]:
    """Return by key what every process knows of the base and an export needs."""
    modules = zip(engine.layout.shapes, engine.modules, strict=True)
    return {
        constant_key(name, shape.name): value
        for shape, module in modules
        for name, value in module.constants().items()
    }


class _Writer:
    """The first process's side of `save`."""

    def __init__(self, final: Path, engine: ZeroEngine, method: Method) -> None:
        self.final, self.folder = final, final.with_name(final.name + ".tmp")
        self.engine, self.method = engine, method
        self.error: OSError | None = None
        """Why the checkpoint cannot be written: nothing more is, but the collectives of `save` go on."""

    def begin(self) -> None:
        """Begin, or begin again."""
        self.error = None
        self.attempt(self._open)

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` unless an earlier one failed."""
        if self.error is not None:
            return
        try:
            action(*arguments)
        except OSError as error:
            self.error = error
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        layout = self.engine.layout
        entries = [
            TensorEntry(
                factor_key(state, shape.name, factor), torch.float32, factor_shape(factor, rank, shape)
            )
            for state in (MASTER, *MOMENTS, *self.method.row_statistics)
            for shape, rank in zip(layout.shapes, layout.ranks, strict=True)
            for factor in layout.factors
            if rank
        ]
        entries += [
            TensorEntry(factor_key(state, shape.name, vector), torch.float32, vector_shape(vector, shape))
            for state in (MASTER, *MOMENTS)
            for shape in layout.shapes
            for vector in layout.vectors
        ]
        entries += [
            TensorEntry(key, value.dtype, tuple(value.shape))
            for key, value in _constants(self.engine).items()
        ]
        entries += [
            TensorEntry(partial_key(name, process), part.dtype, tuple(part.shape))
            for name, part in self.method.partial_statistics.items()
            for process in range(processes.world_size())
        ]
        entries += [
            TensorEntry(replicated_key(name), value.dtype, tuple(value.shape))
            for name, value in self.method.replicated_state.items()
        ]
        self.file = TensorFileWriter(self.folder / TENSORS, entries)

    def tensor(self, name: str, value: Tensor) -> None:
        self.file.write(name, value)

    def rows(self, state: str, module: int, factor: str, rows: Tensor) -> None:
        layout = self.engine.layout
        shape = layout.shapes[module]
        if factor in layout.vectors:
            target = vector_shape(factor, shape)
        else:
            target = factor_shape(factor, layout.ranks[module], shape)
        self.file.write(factor_key(state, shape.name, factor), rows.reshape(target))

    def publish(self, metadata: Mapping[str, Any]) -> None:
        """Write everything to disk, then rename; if the step has a checkpoint already, keep that one."""
        self.file.close()
        state = {**metadata, "format": FORMAT, "blocks": self._modules()}
        write_synced(self.folder / STATE, json.dumps(state))
        files.write_sums(self.folder)
        sync(self.folder)
        if self.final.exists():
            # It differs only by batches discarded since; replacing it would leave a moment without it.
            shutil.rmtree(self.folder)
        else:
            self.folder.rename(self.final)
        sync(self.final.parent)

    def _modules(self) -> dict[str, dict[str, Any]]:
        layout, engine = self.engine.layout, self.engine
        modules = zip(
            layout.shapes, layout.ranks, engine.modules, engine.births, self.method.gates(), strict=True
        )
        return {
            shape.name: {
                "rank": rank,
                "initial_rank": module.initial_rank,
                "scale": module.scale,
                "in_features": shape.in_features,
                "out_features": shape.out_features,
                "births": births.tolist(),
                "gate": None if gate is None else gate.expand(rank).tolist(),
                "part": None if module.part is None else asdict(module.part),
                **({INITIAL_OF: module.initial_of} if isinstance(module, PissaLinear) else {}),
            }
            for shape, rank, module, births, gate in modules
        }
