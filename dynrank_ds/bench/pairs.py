"""Times of two pieces of code in one process, taken pair by pair."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from dynrank_ds.bench.figures import Interval, median_interval


def paired_ratio(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, device: torch.device
) -> Interval:
    """Return the ratio of the seconds of `ours` by those of `theirs`, in the order A B B A ...

    The device is synchronised. A change in the machine's speed meets both of a pair alike; one call of each comes
    before, uncounted.
    """
    ratios: list[float] = []
    _seconds(ours, device), _seconds(theirs, device)
    for pair in range(pairs):
        if pair % 2 == 0:
            mine, other = _seconds(ours, device), _seconds(theirs, device)
        else:
            other, mine = _seconds(theirs, device), _seconds(ours, device)
        ratios.append(mine / other)
    return median_interval(ratios)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
