"""The two sides of a comparison: two groups of processes that run at once, of which one at a time makes a step.

Between its steps a side waits at a pipe and computes nothing, so that both are timed in one run, under the same load.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from dynrank_ds.bench.memory import peak_memory
from dynrank_ds.errors import DynrankError

_PATIENCE = 900.0
"""Seconds for which a side may be silent: loading a model, or one step."""

_FORKED_FROM = [
    "dynrank_ds.training.run",
    "dynrank_ds.zero.plain",
    "dynrank_ds.bench.contenders",
    "dynrank_ds.bench.step",
    "dynrank_ds.bench.hf_trainer",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it, and with it torch's compiler, late
]
"""What the interpreter has imported from which sides are forked that are not fresh."""

AfterStep = Callable[[float], bool]
"""Called with this process's part of a step's loss; returns whether to make another step, once that is known."""


class Contender(Protocol):
    """Something that trains; it must be picklable, and import late what only its own side needs."""

    @property
    def name(self) -> str:
        """Of the side, in rows and messages."""

    def train(self, rank: int, world_size: int, after_step: AfterStep) -> None:
        """Build everything, and make the same step of one batch again and again until `after_step` returns False."""


@dataclass(frozen=True)
class Step:
    """One step of a side."""

    seconds: float
    """Of the slowest process, from when it was asked to its last instruction; of the first step, since the start."""
    loss: float
    """Mean over the processes of what each of them reported."""
    peak_memory: int
    """Bytes, of the process that has held most until then."""


class SideFailedError(Exception):
    """A process of a side ended by an error, which is the message."""


class Side:
    """The processes of a contender, from their start to `close`.

    Raises of every call:
        SideFailedError: a process ended, or said nothing for 15 minutes.
        DynrankError: as a process raised it.
    """

    def __init__(self, contender: Contender, world_size: int, logs: Path, fresh: bool = False) -> None:
        """Start the processes; nothing is waited for.

        Args:
            contender: what trains.
            world_size: processes, which share torch's threads here (OMP_NUM_THREADS, or one a core) evenly.
            logs: folder for what they print.
            fresh: start interpreters that have imported nothing, as peak memory needs it, instead of forking them from
                one that has imported the libraries of all sides.
        """
        self.name = contender.name
        context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        if not fresh:
            context.set_forkserver_preload(_FORKED_FROM)
        port = _free_port()
        self.threads = max(1, torch.get_num_threads() // world_size)
        """Of each process."""
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._log = logs / f"{self.name.replace(' ', '-')}-{port}.log"
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            group = _Group(rank, world_size, port, self.threads, self._log)
            process = context.Process(target=_take_part, args=(theirs, contender, group), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def first_step(self) -> Step:
        """Wait for the step that every contender makes unasked once it stands."""
        return self._collect()

    def step(self) -> Step:
        """Make one step."""
        for connection in self._connections:
            connection.send(True)
        return self._collect()

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()  # ends the wait of the process at the other end
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self) -> Step:
        steps: dict[Any, Step] = {}
        until = time.monotonic() + _PATIENCE
        while missing := [c for c in self._connections if c not in steps]:
            ready = wait(missing, max(0.0, until - time.monotonic()))
            if not ready:
                raise SideFailedError(f"{self.name}: no step within {_PATIENCE:g} s; {self._said()}")
            for connection in ready:
                steps[connection] = self._received(connection)
        losses = [step.loss for step in steps.values()]
        return Step(
            max(step.seconds for step in steps.values()),
            sum(losses) / len(losses),
            max(step.peak_memory for step in steps.values()),
        )

    def _received(self, connection: Any) -> Step:
        try:
            found = connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise SideFailedError(f"{self.name}: a process ended; {self._said()}") from error
        if isinstance(found, DynrankError):
            raise found
        if isinstance(found, str):
            raise SideFailedError(found)
        assert isinstance(found, Step)
        return found

    def _said(self) -> str:
        return "it printed last: " + self._log.read_text(errors="replace")[-2000:]


@dataclass(frozen=True)
class _Group:
    rank: int
    world_size: int
    port: int
    threads: int
    log: Path


def _take_part(connection: Any, contender: Contender, group: _Group) -> None:
    """Run one process of a side until it is ended."""
    file = os.open(group.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(group.rank),
        LOCAL_RANK=str(group.rank),
        WORLD_SIZE=str(group.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(group.port),
    )
    torch.set_num_threads(group.threads)
    began = time.perf_counter()

    def after_step(loss: float) -> bool:
        nonlocal began
        connection.send(Step(time.perf_counter() - began, loss, peak_memory()))
        try:
            connection.recv()
        except EOFError:
            return False
        began = time.perf_counter()
        return True

    try:
        contender.train(group.rank, group.world_size, after_step)
    except DynrankError as error:
        connection.send(error)
    except Exception as error:  # of another library: the side's failure is itself a result
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
