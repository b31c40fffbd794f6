"""A stop that is asked of any process before training begins, while the model loads.

There is nothing to save then, and loading may take many minutes during which the processes wait for one another. So a
thread of every process polls the store of the rendezvous and ends its process once any of them was asked to stop. From
the first step on, the step's own reduction carries the request, and the run is saved.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from dynrank_ds.zero.peer_failure import FAILURE_REPORTED, GRACE

_INTERVAL = 0.5
"""Seconds between two polls of the store."""
_DECISION, _READY, _LEAVING = (f"dynrank/early_stop/{key}" for key in ("decision", "ready", "leaving"))
_STOP, _TRAIN = b"stop", b"train"


class EarlyStop(threading.Thread):
    """One process's part in an early stop; every process of the group must start it.

    asked: whether this process was asked to stop. before_exit: called in each process before it ends. exit_code: of
    all processes that end here.
    """

    def __init__(self, asked: Callable[[], bool], before_exit: Callable[[], None], exit_code: int) -> None:
        super().__init__(name="early stop", daemon=True)
        self._asked, self._before_exit, self._exit_code = asked, before_exit, exit_code
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=GRACE))
        self._ended, self._leaving = threading.Event(), threading.Event()

    def begin_training(self) -> None:
        """Wait for all processes; end all of them where one was asked to stop before, else none from here on."""
        dist.barrier()
        # The first answer is everyone's: it cannot be that one process trains and another one ends.
        if self._store.compare_set(_DECISION, "", _TRAIN.decode()) == _STOP:
            self.join()
        self.cancel()

    def cancel(self) -> None:
        """End the thread, or wait for it where it is ending the process."""
        self._ended.set()
        # The process that ends first makes the main threads of the others fail in their collectives.
        if self._leaving.is_set():
            self.join()

    def run(self) -> None:
        try:
            while not self._ended.wait(_INTERVAL):
                if self._stop_is_decided():
                    self._end_process()
        except RuntimeError:
            return  # the store's process has ended: the main thread fails in its next collective

    def _stop_is_decided(self) -> bool:
        store = self._store
        # After a failure, launchers send SIGTERM to the processes that are left: those report the failure.
        if self._asked() and not store.check([FAILURE_REPORTED]):
            return bool(store.compare_set(_DECISION, "", _STOP.decode()) == _STOP)
        return store.check([_DECISION]) and store.get(_DECISION) == _STOP

    def _end_process(self) -> None:
        """Wait until all processes know of the stop; one that has died makes the main thread fail meanwhile."""
        store, size = self._store, dist.get_world_size()
        store.add(_READY, 1)
        while store.add(_READY, 0) < size:
            time.sleep(_INTERVAL / 5)
        self._leaving.set()
        self._before_exit()
        store.add(_LEAVING, 1)
        deadline = time.monotonic() + GRACE
        # At the first end, a launcher may kill the others. Where the store is gone, process 0 has ended here.
        with suppress(RuntimeError):
            while store.add(_LEAVING, 0) < size and time.monotonic() < deadline:
                time.sleep(_INTERVAL / 5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self._exit_code)  # the main thread may be in a collective or reading weights
