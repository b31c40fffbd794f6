"""A row of a data set, and what became of the rows that cannot be trained on."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynrank_ds.errors import DataError


class UnfitRowError(DataError):
    """One row that cannot be trained on; `reason` is what such rows are counted by."""

    def __init__(self, origin: str, reason: str, message: str) -> None:
        super().__init__(f"{origin}: {message}")
        self.reason = reason


@dataclass(frozen=True)
class Row:
    """One row, and where it stands, so that an error about it can say so."""

    fields: dict[str, Any]
    origin: str

    def renamed(self, columns: Mapping[str, str]) -> "Row":
        """Return the row with the value of column `columns[name]` as field `name`."""
        moved = {name: self.fields[column] for name, column in columns.items() if column in self.fields}
        kept = {name: value for name, value in self.fields.items() if name not in columns.values()}
        return Row(kept | moved, self.origin)

    def text(self, field: str) -> str:
        """Return the field without surrounding white space; UnfitRowError where it is missing, no text, or empty."""
        return self.raw_text(field).strip()

    def raw_text(self, field: str) -> str:
        """Return the field as it is; UnfitRowError where it is missing, no text, or empty."""
        if field not in self.fields:
            known = reprlib.repr(", ".join(sorted(map(str, self.fields))) or "none").strip("'")
            raise self.unfit("a field is missing", f"field {field!r} is missing (fields there: {known})")
        return self.checked(self.fields[field], f"field {field!r}")

    def checked(self, value: Any, what: str) -> str:
        """Return `value` if it is text that can be tokenised; raise UnfitRowError, calling it `what`, if not."""
        if not isinstance(value, str):
            kind = f"{reprlib.repr(value)} ({type(value).__name__})"
            raise self.unfit("a field is no text", f"{what} is {kind}, it must be text")
        if not value.strip():
            raise self.unfit("a field is empty", f"{what} is empty, it must be text")
        # Half a surrogate pair, as JSON's \ud800 alone makes one, is no character.
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.unfit("not Unicode", f"{what} holds half a surrogate pair, which is no Unicode text")
        return value

    def unfit(self, reason: str, message: str) -> UnfitRowError:
        """Return the error that says why this row cannot be trained on."""
        return UnfitRowError(self.origin, reason, message)


@dataclass
class Drops:
    """The rows left out, counted by reason, with the first of each.

    Rows that `data.filter` leaves out on purpose are not among them.
    """

    n_rows: int = 0
    """Rows seen, dropped ones included."""
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    """By reason, the message about its first row."""

    too_long: dict[str, int] = field(default_factory=dict)
    """By number of tokens, how many dropped rows have it; "" for those too long to be tokenised."""
    n_truncated: int = 0
    """Rows cut to data.max_length."""

    def add_length(self, n_tokens: int | None) -> None:
        """Note the length of a row that is too long."""
        key = "" if n_tokens is None else str(n_tokens)
        self.too_long[key] = self.too_long.get(key, 0) + 1

    def advice(self, kept: NDArray[np.int64], max_length: int) -> str:
        """Which data.max_length would keep 99 % of the rows, as the end of a sentence; "" where the present one does.

        kept: tokens of each row that was not dropped.
        """
        dropped = [int(tokens) for tokens, count in self.too_long.items() if tokens for _ in range(count)]
        lengths = np.sort(np.concatenate([kept, np.array(dropped, dtype=np.int64)]))
        place = math.ceil(0.99 * (len(lengths) + self.too_long.get("", 0)))
        if not self.too_long or (place and place <= len(lengths) and lengths[place - 1] <= max_length):
            return ""
        if place > len(lengths):
            return "; data.overflow truncate would cut long rows instead"
        return (
            f"; data.max_length {lengths[place - 1]} would keep 99 % of the rows, and data.overflow truncate would cut "
            "long ones instead"
        )

    def add(self, error: UnfitRowError) -> None:
        """Count one dropped row."""
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        self.first.setdefault(error.reason, str(error))

    @property
    def n_dropped(self) -> int:
        """Rows dropped, for whatever reason."""
        return sum(self.counts.values())

    def summary(self) -> str:
        """Return the counts and the first rows, for people."""
        reasons = "; ".join(f"{count}: {self.first[reason]}" for reason, count in self.counts.items())
        return f"{self.n_dropped} of {self.n_rows} rows cannot be trained on ({reasons})"

    def check(self, max_dropped: float, advice: str = "") -> None:
        """Refuse a data set of which more than the fraction `max_dropped` was dropped, or everything.

        Raises:
            DataError: with the counts and the first rows.
        """
        if self.n_dropped and (self.n_dropped == self.n_rows or self.n_dropped > max_dropped * self.n_rows):
            raise DataError(
                f"{self.summary()}, at most {max_dropped:.1%} may be: mend them, or raise data.max_dropped{advice}"
            )
