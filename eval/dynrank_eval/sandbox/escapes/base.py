"""What an attempt is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Escape:
    """An attempt.

    Attributes:
        aim: what it is after, in a few words.
        source: the program.
        outcomes: the verdicts that are right for it.
        kills: it would end the evaluator and the user's other processes where nothing keeps it from them.
    """

    name: str
    aim: str
    source: str
    outcomes: tuple[str, ...] = ("failed",)
    kills: bool = False


EITHER = ("failed", "timeout")


def solve(body: str) -> str:
    """Return a module whose `solve` has this body."""
    return "import os, sys\ndef solve():\n" + "".join(
        f"    {line}\n" for line in body.strip("\n").split("\n")
    )
