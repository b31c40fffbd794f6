"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_memory(work: Callable[[], object]) -> int:
    """Return the bytes that this process held at most during `work`, beyond what it held before."""
    CLEAR.write_text("5")  # the high-water mark starts anew
    before = _read("VmRSS")
    work()
    return max(0, _read("VmHWM") - before)


def peak_memory() -> int:
    """Return the bytes that this process has held at most, since its program began or `added_memory` was last called.

    Everything resident counts: the interpreter, libraries, and mapped pages of files such as weights.
    """
    return _read("VmHWM")


def resident_memory() -> int:
    """Return the bytes that this process holds now."""
    return _read("VmRSS")


def _read(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024
