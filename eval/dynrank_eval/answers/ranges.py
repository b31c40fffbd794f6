r"""Inequalities and intervals of one variable as what they say: x \le 3, 3 \ge x and (-\infty, 3] are the same."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dynrank_eval.answers.arithmetic import UnreadableError

_SIGN = re.compile(r"\\(?:leq?|geq?|lt|gt)(?:slant)?(?![A-Za-z])|<=|>=|<|>")
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
    """Whether a text holds an order sign."""
    return _SIGN.search(text) is not None


def same_range(gold: str, answer: str, same: Callable[[str, str], bool]) -> bool:
    """Whether two inequalities, or an inequality and an interval, say the same; `same` compares their bounds.

    Raises:
        UnreadableError: one is neither, or they name different variables.
    """
    first, second = _range(gold), _range(answer)
    if first.variable and second.variable and first.variable != second.variable:
        raise UnreadableError
    if (first.low_closed, first.high_closed) != (second.low_closed, second.high_closed):
        return False
    return all(
        a == b or ("\\infty" not in a + b and same(a, b))
        for a, b in ((first.low, second.low), (first.high, second.high))
    )


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
