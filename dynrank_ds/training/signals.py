"""SIGTERM and SIGUSR1 ask a run to save and stop; all processes agree on it, and end with one exit code.

This module imports nothing that takes time: launcher/train.py calls `note_signals` before all other imports.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._received = False
        self._numbers: int | None = None

    @property
    def received(self) -> bool:
        """Whether `ask` was called or a noted signal has come, also while the main thread is in a collective."""
        if self._numbers is not None and not self._received:
            with suppress(BlockingIOError):  # no signal has come
                if any(number in SIGNALS for number in os.read(self._numbers, 256)):
                    self._received = True
        return self._received

    def ask(self) -> None:
        """Ask this process to stop."""
        self._received = True

    def _note(self) -> None:
        # Python calls its handlers between two instructions of the main thread, which may be far apart; the number
        # of the signal is in the pipe at once.
        self._numbers, writing = os.pipe()
        for descriptor in (self._numbers, writing):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def note_signals() -> StopRequest:
    """Note SIGTERM and SIGUSR1 from now on, in place of what they would do to this process."""
    request = StopRequest()
    request._note()
    return request


def exit_code_when_stopped() -> int:
    """Return the exit code of every process of a run that was stopped: 75, EX_TEMPFAIL of sysexits.h.

    It is 0 under `torchrun --max-restarts`, which would restart processes that end with any other code.
    """
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else os.EX_TEMPFAIL
