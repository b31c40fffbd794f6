"""Errors of a shared disk that pass by themselves, such as those while its server restarts, are waited for."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN)
"""Numbers of these errors."""
PATIENCE = 120.0
"""Seconds for which one thing is tried again."""
PAUSE = 5.0
"""Seconds between two tries."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Patience:
    """The time that is left for trying one thing again."""

    def __init__(self, what: object) -> None:
        self._what, self._deadline = what, time.monotonic() + PATIENCE

    def is_for(self, error: OSError) -> bool:
        """Say that there will be another try, wait for it, and return True; False where there is none."""
        left = self._deadline - time.monotonic()
        if error.errno not in PASSING or left <= 0:
            return False
        logger.warning("%s: %s; it is tried again for up to %.0f s", self._what, error.strerror, left)
        time.sleep(PAUSE)
        return True


def patiently(action: Callable[[], T], what: object) -> T:
    """Return what `action` returns, which is called again while it fails with an error that may pass.

    what: that messages name.

    Raises:
        OSError: another error, or one that did not pass.
    """
    patience = Patience(what)
    while True:
        try:
            return action()
        except OSError as error:
            if not patience.is_for(error):
                raise
