"""Reading a checkpoint back into a run, at any world size and ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dynrank_ds.adapters.linear import FACTORS, VECTORS
from dynrank_ds.checkpoint.files import TENSORS, Progress, read_state
from dynrank_ds.checkpoint.initial import IN_STATE, INITIAL_OF, InitialTriples
from dynrank_ds.checkpoint.keys import MASTER, factor_key, partial_key, replicated_key
from dynrank_ds.errors import RunError
from dynrank_ds.methods.base import Method
from dynrank_ds.ranking.layout import Fragment
from dynrank_ds.tensorfile import TensorFileReader
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine


class Checkpoint:
    """A checkpoint that passed its check, read tensor by tensor.

    Attributes:
        path: its folder.
        metadata: the content of state.json.

    Raises:
        RunError: state.json is damaged, or has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_state(path)

    @property
    def progress(self) -> Progress:
        """How far the run had come."""
        return Progress(self.metadata["step"], self.metadata["batch"])

    def factors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield (module, {factor or vector: fp32 weights}) of every adapted module, one after another."""
        with TensorFileReader(self.path / TENSORS) as file:
            for module in self.metadata["blocks"]:
                keys = {name: factor_key(MASTER, module, name) for name in (*FACTORS, *VECTORS)}
                yield module, {factor: file.read(key) for factor, key in keys.items() if key in file.entries}

    def initial_ranks(self) -> dict[str, int]:
        """Return the ranks that modules had when the run began; checkpoints of before this was saved say none."""
        modules = self.metadata["blocks"].items()
        return {name: values["initial_rank"] for name, values in modules if "initial_rank" in values}

    def initial_triples(self) -> Iterator[tuple[str, list[int | None], dict[str, Tensor]]]:
        """Yield (module, initial_of, factors) of a PiSSA run's modules, as `PissaLinear.set_initial` takes them.

        Raises:
            RunError: the run directory has not the initial triples that the checkpoint names.
        """
        with InitialTriples(self.path.parents[1], self.metadata[IN_STATE]) as stored:
            for module, about in self.metadata["blocks"].items():
                numbers = [number for number in about[INITIAL_OF] if number is not None]
                yield module, about[INITIAL_OF], stored.rows(module, numbers)

    def restore(self, engine: ZeroEngine, method: Method) -> None:
        """Load optimizer state and statistics into an engine built at these ranks, and a method that was started.

        Raises:
            RunError, TensorFileError: the checkpoint lacks a statistic of the method, or has it in another shape.
        """
        layout = engine.layout
        with TensorFileReader(self.path / TENSORS) as file:

            def part(state: str, of: Fragment) -> Tensor:
                key = factor_key(state, layout.shapes[of.module].name, of.factor)
                return file.read_part(key, of.start, of.stop)

            modules = self.metadata["blocks"]
            births = [torch.tensor(modules[s.name]["births"], dtype=torch.int64) for s in layout.shapes]
            engine.load(births, self.progress.step, part)
            for name, flat in method.row_statistics.items():
                for of, view in zip(layout.fragments, layout.split(flat), strict=True):
                    view.copy_(part(name, of))
            for name, local in method.partial_statistics.items():
                self._fill(local, partial_key(name, processes.rank()), _part(file, name))
            for name, tensor in method.replicated_state.items():
                self._fill(tensor, replicated_key(name), file.read(replicated_key(name)))
        method.restored()

    def _fill(self, tensor: Tensor, name: str, saved: Tensor) -> None:
        if saved.shape != tensor.shape:
            raise RunError(
                f"{self.path / TENSORS}: {name} has shape {tuple(saved.shape)}; the method needs {tuple(tensor.shape)}"
            )
        tensor.copy_(saved)


def _part(file: TensorFileReader, statistic: str) -> Tensor:
    """Return this process's part of a sum over processes.

    With the world size of the checkpoint each process reads its own part; with another, the first reads their sum.
    """
    parts = [key for key in file.entries if key.startswith(partial_key(statistic, ""))]
    rank = processes.rank()
    if len(parts) == processes.world_size():
        return file.read(partial_key(statistic, rank))
    own = file.read(parts[0] if parts else partial_key(statistic, 0))
    return sum((file.read(key) for key in parts[1:]), own.double()) if rank == 0 else torch.zeros_like(own)
