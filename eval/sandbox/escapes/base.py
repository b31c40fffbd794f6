"""What an attempt is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Escape:
    """An attempt.

    Attributes:
        aim: what it is after, in a few words.
        source: the program.
        outcomes: the verdicts that are right for it.
    """

    name: str
    aim: str
    source: str
    outcomes: tuple[str, ...] = ("failed",)


EITHER = ("failed", "timeout")


def solve(body: str) -> str:
    """A module whose `solve` has this body."""
    return "import os, sys\ndef solve():\n" + "".join(
        f"    {line}\n" for line in body.strip("\n").split("\n")
    )
