"""Checkpoints: one safetensors file and one JSON, complete or not there at all.

The adapters are small, so their whole state is written by module, free of world size: fp32 weights, moments,
ages and statistics. The frozen base is named, never written. No random state is needed: data order and
initial values are functions of the seed and the step.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrank_ds.adapters.linear import FACTORS
from dynrank_ds.checkpoints import FORMAT, STATE, TENSORS, finished, read_state, seal
from dynrank_ds.errors import RunError
from dynrank_ds.files import sync, write_synced
from dynrank_ds.methods.base import Method
from dynrank_ds.ranking.layout import Fragment
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader, TensorFileWriter
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine
from dynrank_ds.zero.shards import MOMENTS

logger = logging.getLogger(__name__)


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
    kept: int,
    kind: str,
) -> None:
    """Writes a checkpoint under a temporary name, renames it, and removes all of its kind but the newest `kept`.

    Every process must call it. about: what else goes into state.json. kind: STEP, or BEST.

    Raises:
        RunError: on every process, if the first could not write it; what was there before is whole.
    """
    final = run / "checkpoints" / f"{kind}-{progress.step}"
    statistics = {name: engine.layout.split(value) for name, value in method.row_statistics.items()}
    states = engine.states() | statistics
    writer = _Writer(final, engine, method) if processes.rank() == 0 else None
    for name, state in states.items():
        for module, factor, rows in engine.whole_rows(state):
            if writer:
                writer.attempt(writer.rows, name, module, factor, rows)
    for statistic, part in method.partial_statistics.items():
        # Each process's part, not their sum: added up in another order, scores would differ in their last bits.
        for process, theirs in enumerate(processes.from_each_process(part)):
            if writer:
                writer.attempt(writer.tensor, f"statistics/{statistic}/{process}", theirs)
    if writer:
        for key, value in method.replicated_state.items():
            writer.attempt(writer.tensor, f"replicated/{key}", value)
        writer.attempt(writer.publish, {**asdict(progress), **about})
        writer.attempt(remove, finished(run, kind)[kept:])
    failed = torch.tensor(float(writer is not None and writer.error is not None), device=engine.layout.device)
    # Also what all wait at until the checkpoint is there.
    if processes.all_reduce_sum(failed) > 0:
        error = writer.error if writer else None
        raise RunError(
            f"the checkpoint {final} could not be written ({error}); the ones before it are whole: "
            "make room or mend the disk, then go on with resume=auto"
        ) from error


def remove(checkpoints: Iterable[Path]) -> None:
    """Removes folders; one that is half removed does not look like a checkpoint.

    One that cannot be removed, since somebody reads it on a network disk, say, is told and stays.
    """
    for path in checkpoints:
        unfinished = path if path.suffix == ".tmp" else path.with_name(f"{path.name}.old.tmp")
        try:
            path.rename(unfinished)
            shutil.rmtree(unfinished)
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error)


def set_aside(checkpoints: Iterable[Path], whole: Path | None) -> None:
    """Takes damaged checkpoints, those before `whole`, out of the way of new ones; who wants can look at them."""
    for path in takewhile(lambda path: path != whole, checkpoints):
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


class _Writer:
    """The first process's side of `save`."""

    def __init__(self, final: Path, engine: ZeroEngine, method: Method) -> None:
        self.final, self.folder = final, final.with_name(final.name + ".tmp")
        self.engine, self.method = engine, method
        self.error: OSError | None = None
        """Why the checkpoint cannot be written: nothing more is, but the other processes are not left waiting."""
        self.attempt(self._open)

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Does it unless something failed before."""
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
            TensorEntry(_name(state, shape.name, factor), torch.float32, _factor_shape(factor, rank, shape))
            for state in ("master", *MOMENTS, *self.method.row_statistics)
            for shape, rank in zip(layout.shapes, layout.ranks, strict=True)
            for factor in layout.factors
            if rank
        ]
        entries += [
            TensorEntry(f"statistics/{name}/{process}", part.dtype, tuple(part.shape))
            for name, part in self.method.partial_statistics.items()
            for process in range(processes.world_size())
        ]
        entries += [
            TensorEntry(f"replicated/{name}", value.dtype, tuple(value.shape))
            for name, value in self.method.replicated_state.items()
        ]
        self.file = TensorFileWriter(self.folder / TENSORS, entries)

    def tensor(self, name: str, value: Tensor) -> None:
        self.file.write(name, value)

    def rows(self, state: str, module: int, factor: str, rows: Tensor) -> None:
        shape = self.engine.layout.shapes[module]
        target = _factor_shape(factor, self.engine.layout.ranks[module], shape)
        self.file.write(_name(state, shape.name, factor), rows.reshape(target))

    def publish(self, about: dict[str, Any]) -> None:
        """Everything on the disk, then the name that says so; if the step has a checkpoint already, that stays."""
        self.file.close()
        write_synced(self.folder / STATE, json.dumps(about | {"format": FORMAT, "blocks": self._modules()}))
        seal(self.folder)
        sync(self.folder)
        if self.final.exists():
            # It is the same but for batches discarded since; to replace it, it would have to be away for a moment.
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
                "scale": module.scale,
                "in_features": shape.in_features,
                "out_features": shape.out_features,
                "births": births.tolist(),
                "gate": None if gate is None else gate.expand(rank).tolist(),
                "part": None if module.part is None else asdict(module.part),
            }
            for shape, rank, module, births, gate in modules
        }


def _name(state: str, module: str, factor: str) -> str:
    return f"{state}/{module}.{factor}"


def _factor_shape(factor: str, rank: int, shape: Any) -> tuple[int, ...]:
    return (rank,) if factor == "lora_E" else (rank, shape.row_length(factor))


class Checkpoint:
    """A checkpoint that was checked, read back tensor by tensor.

    Raises:
        RunError: state.json is damaged, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = read_state(path)

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return Progress(self.about["step"], self.about["batch"])

    def factors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(module, {factor: fp32 weights}) of every module, one after another, to build the adapters at their ranks."""
        with TensorFileReader(self.path / TENSORS) as file:
            for module in self.about["blocks"]:
                names = {factor: _name("master", module, factor) for factor in FACTORS}
                yield (
                    module,
                    {factor: file.read(name) for factor, name in names.items() if name in file.entries},
                )

    def restore(self, engine: ZeroEngine, method: Method) -> None:
        """Puts everything into an engine that was built at these ranks, and a method that was started."""
        layout = engine.layout
        with TensorFileReader(self.path / TENSORS) as file:

            def part(state: str, of: Fragment) -> Tensor:
                name = _name(state, layout.shapes[of.module].name, of.factor)
                return file.read_part(name, of.start, of.stop)

            modules = self.about["blocks"]
            births = [torch.tensor(modules[s.name]["births"], dtype=torch.int64) for s in layout.shapes]
            engine.load(births, self.progress.step, part)
            for name, flat in method.row_statistics.items():
                for of, view in zip(layout.fragments, layout.split(flat), strict=True):
                    view.copy_(part(name, of))
            for name, value in method.partial_statistics.items():
                value.copy_(_part(file, name))
            for name, value in method.replicated_state.items():
                value.copy_(file.read(f"replicated/{name}"))
        method.restored()


def _part(file: TensorFileReader, statistic: str) -> Tensor:
    """This process's part of a sum over processes; as many as there were have theirs, else the first has all."""
    parts = [name for name in file.entries if name.startswith(f"statistics/{statistic}/")]
    rank = processes.rank()
    if len(parts) == processes.world_size():
        return file.read(f"statistics/{statistic}/{rank}")
    total = torch.zeros(file.entries[parts[0]].shape, dtype=torch.float64)
    for name in parts if rank == 0 else []:
        total += file.read(name)
    return total
