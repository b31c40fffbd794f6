"""When ranks are adjusted: the optimizer steps that a method's times leave for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from dynrank_ds.errors import RecipeError


def resolve_steps(value: int | float, total_steps: int, key: str, at_least: int = 0) -> int:
    """Return a time in steps; a float below 1 is a fraction of `total_steps`.

    Raises:
        RecipeError: the value is a float of 1 or more, or comes to fewer than `at_least` steps.
    """
    if isinstance(value, float) and value >= 1:
        raise RecipeError(f"{key} is {value}: give whole steps, or a fraction of training below 1")
    steps = value if isinstance(value, int) else round(value * total_steps)
    if steps < at_least:
        raise RecipeError(f"{key} is {value}, {steps} of the {total_steps} steps: give at least {at_least}")
    return steps


@dataclass(frozen=True)
class Schedule:
    """The adjustments of a run, as optimizer steps from 1; empty for a method that never adjusts ranks."""

    total_steps: int = 0
    t_i: int = 0
    """Initial steps without adjustment."""
    interval: int = 1
    end: int = 0
    """`total_steps` less the final steps without adjustment."""
    steps: tuple[int, ...] = ()
    """The steps after which ranks are adjusted, in ascending order."""

    @classmethod
    def resolve(
        cls,
        total_steps: int,
        t_i: int | float,
        interval: int | float,
        t_f: int | float = 0,
        t_f_at_least: int = 0,
    ) -> Schedule:
        """Return the phase of a recipe's `method.t_i`, `method.interval` and `method.t_f`, still without steps.

        Raises:
            RecipeError: one of them is no number of steps, or is too small.
        """
        final = resolve_steps(t_f, total_steps, "method.t_f", t_f_at_least)
        return cls(
            total_steps,
            resolve_steps(t_i, total_steps, "method.t_i"),
            resolve_steps(interval, total_steps, "method.interval", at_least=1),
            total_steps - final,
        )

    def adjusting(self, regular: Iterable[int], others: Iterable[int] = ()) -> Schedule:
        """Return this phase with its adjustments: `regular`, every interval, and `others`.

        Raises:
            RecipeError: there is no regular one.
        """
        steps = set(regular)
        if not steps:
            final = self.total_steps - self.end
            less = f" less method.t_f {final}" if final else ""
            raise RecipeError(
                f"method.t_i {self.t_i} + method.interval {self.interval} leaves no adjustment before step {self.end} "
                f"(train steps {self.total_steps}{less}): lower them, or train for more steps"
            )
        return replace(self, steps=tuple(sorted(steps.union(others))))

    def first_multiple(self) -> int:
        """Return the first multiple of the interval after t_i."""
        return (self.t_i // self.interval + 1) * self.interval

    @cached_property
    def _members(self) -> frozenset[int]:
        return frozenset(self.steps)

    def __contains__(self, step: int) -> bool:
        return step in self._members

    def __len__(self) -> int:
        return len(self.steps)
