r"""Inequalities and intervals of one variable as what they say: x \le 3, 3 \ge x and (-\infty, 3] are the same."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dynrank_eval.answers.arithmetic import UnreadableError

_SIGN = re.compile(r"\\(?:leq?|geq?|lt|gt)(?:slant)?(?![A-Za-z])|<=|>=|<|>")
_BOUND = re.compile(
    r"\b(?:at (?:least|most)|up to|(?:more|less|fewer|greater) than|or (?:more|less|fewer|greater|above|below))\b"
)
_VARIABLE = re.compile(r"[A-Za-z]|\\(?:alpha|beta|theta|lambda|mu|phi)")
_INTERVAL = re.compile(r"(?P<low>[(\[])(?P<inside>[^()\[\],;]+[,;][^()\[\],;]+)(?P<high>[)\]])")


@dataclass(frozen=True)
class _Range:
    variable: str
    low: str
    low_closed: bool
    high: str
    high_closed: bool


def is_inequality(text: str) -> bool:
    """Whether a text holds an order sign, or says so in words ("at least")."""
    return _SIGN.search(text) is not None or _BOUND.search(text) is not None


def same_range(gold: str, answer: str, same: Callable[[str, str], bool]) -> bool:
    r"""Whether two texts of inequalities or intervals say the same; `same` compares their bounds.

    Several inequalities (x < 2, x > 3) are the union of intervals: (-\infty, 2) \cup (3, \infty).

    Raises:
        UnreadableError: one is neither, or they name different variables.
    """
    first, second = _ranges(gold), _ranges(answer)
    names = [{each.variable for each in ranges if each.variable} for ranges in (first, second)]
    if names[0] and names[1] and names[0] != names[1]:
        raise UnreadableError
    if len(first) != len(second):
        return False
    for wanted in first:
        place = next((n for n, each in enumerate(second) if _is_same(wanted, each, same)), None)
        if place is None:
            return False
        del second[place]
    return True


def _is_same(first: _Range, second: _Range, same: Callable[[str, str], bool]) -> bool:
    if first.variable and second.variable and first.variable != second.variable:
        return False
    if (first.low_closed, first.high_closed) != (second.low_closed, second.high_closed):
        return False
    return all(
        a == b or ("\\infty" not in a + b and same(a, b))
        for a, b in ((first.low, second.low), (first.high, second.high))
    )


def _ranges(text: str) -> list[_Range]:
    separator = "," if is_inequality(text) else r"\\cup(?![a-z])"
    return [_range(part) for part in re.split(separator, text)]


def _range(text: str) -> _Range:
    signs = _SIGN.findall(text)
    parts = [part.strip() for part in _SIGN.split(text)]
    if not signs:
        interval = _INTERVAL.fullmatch(text.replace("+\\infty", "\\infty").strip())
        if interval is None:
            raise UnreadableError
        low, high = (part.strip() for part in re.split("[,;]", interval["inside"]))
        return _Range("", low, interval["low"] == "[", high, interval["high"] == "]")
    greater = [sign.startswith((">", "\\g")) for sign in signs]
    closed = ["e" in sign or "=" in sign for sign in signs]
    if len(set(greater)) != 1 or not all(parts):
        raise UnreadableError
    if greater[0]:
        parts, closed = parts[::-1], closed[::-1]
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[1]):
        return _Range(parts[1], parts[0], closed[0], parts[2], closed[1])
    variables = [bool(_VARIABLE.fullmatch(part)) for part in parts]
    if len(parts) == 2 and sum(variables) == 1:
        if variables[0]:
            return _Range(parts[0], "-\\infty", False, parts[1], closed[0])
        return _Range(parts[1], parts[0], closed[0], "\\infty", False)
    raise UnreadableError
