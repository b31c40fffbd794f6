"""Checkpoints: one safetensors file and one JSON, complete or not there at all.

The adapters are small, so their whole state is written by block, free of world size: fp32 weights, moments,
ages and statistics. The frozen base is named, never written. No random state is needed: data order and
initial values are functions of the seed and the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrank_ds.checkpoints import FORMAT, STATE, TENSORS, check_tensors, read_state
from dynrank_ds.methods.base import Method
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader, TensorFileWriter, file_sha256
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine
from dynrank_ds.zero.shards import MOMENTS


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps applied."""
    batch: int = 0
    """Global batches consumed: more than `step` by the discarded ones."""


def save(
    run: Path,
    progress: Progress,
    engine: ZeroEngine,
    method: Method,
    about: Mapping[str, Any],
    name: str | None = None,
) -> Path:
    """Writes `checkpoints/step-N` under a temporary name, then renames it. Every process must call it.

    about: what else goes into state.json. name: what the folder is called instead, which resuming passes over.
    """
    final = run / "checkpoints" / (name or f"step-{progress.step}")
    folder = final.with_name(final.name + ".tmp")
    writer = _Writer(folder, engine, method) if processes.rank() == 0 else None
    names = ("master", *MOMENTS, *method.row_statistics())
    states = torch.stack(
        [engine.weights(), *(engine.moments(m) for m in MOMENTS), *method.row_statistics().values()]
    )
    for block, factor, rows in engine.whole_rows(states):
        if writer:
            writer.rows(names, block, factor, rows)
    for statistic, part in method.partial_statistics().items():
        whole = processes.total(part.clone())
        if writer:
            writer.file.write(f"statistics/{statistic}", whole)
    if writer:
        for key, value in method.replicated_state().items():
            writer.file.write(f"replicated/{key}", value)
        writer.finish(final, {**asdict(progress), **about})
    processes.barrier()
    return final


class _Writer:
    """The first process's side of `save`."""

    def __init__(self, folder: Path, engine: ZeroEngine, method: Method) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.engine, self.method = folder, engine, method
        layout = engine.layout
        entries = [
            TensorEntry(f"{state}/{shape.name}.{factor}", torch.float32, _factor_shape(factor, rank, shape))
            for state in ("master", *MOMENTS, *method.row_statistics())
            for shape, rank in zip(layout.shapes, layout.ranks, strict=True)
            for factor in layout.factors
            if rank
        ]
        entries += [
            TensorEntry(f"statistics/{name}", torch.float32, tuple(part.shape))
            for name, part in method.partial_statistics().items()
        ]
        entries += [
            TensorEntry(f"replicated/{name}", value.dtype, tuple(value.shape))
            for name, value in method.replicated_state().items()
        ]
        self.file = TensorFileWriter(folder / TENSORS, entries)

    def rows(self, states: tuple[str, ...], block: int, factor: str, rows: Tensor) -> None:
        shape = self.engine.layout.shapes[block]
        for state, value in zip(states, rows, strict=True):
            target = _factor_shape(factor, self.engine.layout.ranks[block], shape)
            self.file.write(f"{state}/{shape.name}.{factor}", value.reshape(target))

    def finish(self, final: Path, about: dict[str, Any]) -> None:
        self.file.close()
        layout = self.engine.layout
        about |= {
            "format": FORMAT,
            "blocks": {
                shape.name: {
                    "rank": rank,
                    "scale": block.scale,
                    "in_features": shape.in_features,
                    "out_features": shape.out_features,
                    "births": births.tolist(),
                    "gate": None if gate is None else gate.expand(rank).tolist(),
                    "part": None if block.part is None else asdict(block.part),
                }
                for shape, rank, block, births, gate in zip(
                    layout.shapes,
                    layout.ranks,
                    self.engine.blocks,
                    self.engine.births,
                    self.method.gates(),
                    strict=True,
                )
            },
            "sha256": file_sha256(self.folder / TENSORS),
        }
        with (self.folder / STATE).open("w") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        self.folder.rename(final)
        directory = os.open(final.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def _factor_shape(factor: str, rank: int, shape: Any) -> tuple[int, ...]:
    return (rank,) if factor == "lora_E" else (rank, shape.row_length(factor))


class Checkpoint:
    """A checkpoint read back, tensor by tensor.

    Raises:
        RunError: it is damaged, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = read_state(path)
        self._tensors = check_tensors(path, self.about)

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return Progress(self.about["step"], self.about["batch"])

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """{block: {factor: fp32 weights}}, to build the adapters at the ranks they had."""
        out: dict[str, dict[str, Tensor]] = {name: {} for name in self.about["blocks"]}
        with TensorFileReader(self._tensors) as file:
            for name in file.entries:
                state, _, parameter = name.partition("/")
                if state == "master":
                    block, _, factor = parameter.rpartition(".")
                    out[block][factor] = file.read(name)
        return out

    def restore(self, engine: ZeroEngine, method: Method) -> None:
        """Puts everything into an engine that was built at these ranks, and a method that was started."""
        with TensorFileReader(self._tensors) as file:

            def flat(state: str) -> Tensor:
                layout = engine.layout
                pieces = [
                    file.read(f"{state}/{layout.shapes[f.block].name}.{f.factor}").flatten()[f.start : f.stop]
                    for f in layout.fragments
                ]
                return torch.cat(pieces).to(layout.device)

            births = [torch.tensor(b["births"], dtype=torch.int64) for b in self.about["blocks"].values()]
            engine.load(flat("master"), {m: flat(m) for m in MOMENTS}, births, self.progress.step)
            method.set_row_statistics({name: flat(name) for name in method.row_statistics()})
            # A sum of parts: the first process takes the whole, the others nothing.
            mine = float(processes.rank() == 0)
            method.set_partial_statistics(
                {name: file.read(f"statistics/{name}") * mine for name in method.partial_statistics()}
            )
            method.set_replicated_state(
                {name: file.read(f"replicated/{name}") for name in method.replicated_state()}
            )
