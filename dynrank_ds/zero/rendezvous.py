"""Where the processes of a run meet: the address, what is said while some are missing, and why they did not meet."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dynrank_ds.errors import MachineError

RESOLVE_SECONDS = 60.0
"""For which the name of the first node may be unknown: that of a node that is just starting is, for some seconds."""
_MESSAGE_INTERVAL = 60.0
_OVERTIME = 10.0

_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}

logger = logging.getLogger(__name__)


def set_variables() -> None:
    """Set what a launcher would have set, where there is none: from srun's variables, or for a single process.

    Raises:
        MachineError: under srun, the address of the first node is not set.
    """
    if "RANK" not in os.environ:
        os.environ.update(_rank_without_launcher())


def _rank_without_launcher() -> dict[str, str]:
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        if "MASTER_ADDR" not in os.environ:
            raise MachineError(
                "MASTER_ADDR is not set under srun with several tasks: set it to the first node's name"
            )
        return {name: os.environ[slurm] for name, slurm in _SLURM.items()} | {
            "MASTER_PORT": os.environ.get("MASTER_PORT", "29500")
        }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def wait_for_name(seconds: float) -> None:
    """Wait until the name of the first node resolves.

    Raises:
        MachineError: it still does not after so many seconds.
    """
    address, deadline = os.environ["MASTER_ADDR"], time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:  # of the resolver
            if time.monotonic() >= deadline:
                raise MachineError(
                    f"MASTER_ADDR '{address}' does not resolve on {socket.gethostname()} ({error.strerror}): set it "
                    "to a name or an address of the first node that every node knows"
                ) from error
        time.sleep(min(1.0, seconds))


@contextmanager
def watched(timeout: float, interval: float = _MESSAGE_INTERVAL) -> Iterator[None]:
    """Say every `interval` seconds, on each node once, that the processes have not all met yet.

    torch waits for ever for an address that takes connections and never answers, as one of another service may: this
    process ends with exit code 2 some seconds after the timeout that torch should have kept.
    """
    met, began = threading.Event(), time.monotonic()
    deadline = began + timeout + _OVERTIME

    def watch() -> None:
        while not met.wait(max(0.0, min(interval, deadline - time.monotonic()))):
            waited = time.monotonic() - began
            if waited >= timeout + _OVERTIME:
                logger.error("%s", failure("it takes connections and does not answer", timeout))
                sys.stderr.flush()
                os._exit(2)
            if os.environ["LOCAL_RANK"] == "0":
                logger.warning(
                    "process %s on %s has waited %.0f s for all %s processes to meet at %s",
                    os.environ["RANK"],
                    socket.gethostname(),
                    waited,
                    os.environ["WORLD_SIZE"],
                    _place(),
                )

    threading.Thread(target=watch, name="rendezvous", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def failure(error: object, timeout: float) -> str:
    """Return the sentence for torch's error of a rendezvous."""
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is in use, perhaps by another run: give "
            "a free port with --master_port of deepspeed or torchrun, or with MASTER_PORT"
        )
    size = os.environ["WORLD_SIZE"]
    return f"the {size} processes did not all meet at {_place()} within {timeout:g} s: {error}"


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
