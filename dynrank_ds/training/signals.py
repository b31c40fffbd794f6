"""SIGTERM and SIGUSR1 ask a run to save and stop; the step's reduction makes all processes agree."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
