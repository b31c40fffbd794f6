"""What a check found, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"


class CheckFailedError(Exception):
    """Something is not as it should be, with the figures."""


class NotHereError(Exception):
    """A check that this machine cannot make, with what it would need."""


@dataclass(frozen=True)
class Outcome:
    """One row of the table."""

    check: str
    status: str
    """One of PASSED, FAILED, SKIPPED and MEASURED; what is measured has no limit that it must keep."""
    detail: str
    seconds: float


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the rows, and a last line that counts them."""
    width = max(len(outcome.check) for outcome in outcomes)
    rows = [f"{o.check:{width}}  {o.status:8}  {o.seconds:4.0f} s  {o.detail}" for o in outcomes]
    statuses = [outcome.status for outcome in outcomes]
    counts = [
        f"{statuses.count(status)} {status}"
        for status in (PASSED, MEASURED, SKIPPED, FAILED)
        if status in statuses
    ]
    return "\n".join([*rows, ", ".join(counts)])
