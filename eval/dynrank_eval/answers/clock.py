"""Compares times of day: 4:30 p.m. is 16:30 and never 4:30 a.m."""

import re

_TIME = re.compile(
    r"(?P<hour>[0-9]{1,2})(?::(?P<minute>[0-9]{2}))?\s*(?:\\text\s*\{\s*)?(?:(?P<half>[ap])\.?\s*m\b\.?)?\s*\}?",
    re.IGNORECASE,
)
_HALF_A_DAY = 12 * 60


def same_time(gold: str, answer: str) -> bool | None:
    """Return whether two answers are the same time of day; None where they are no times, or lack "a.m." and "p.m.".

    A time without it may be in either half of the day, unless its hour is past 12.
    """
    first, second = _TIME.fullmatch(gold), _TIME.fullmatch(answer)
    if first is None or second is None or not (first["half"] or second["half"]):
        return None
    return not _minutes(first).isdisjoint(_minutes(second))


def _minutes(time: "re.Match[str]") -> set[int]:
    """Return the minutes since midnight that a time may mean."""
    hour, minute = int(time["hour"]), int(time["minute"] or 0)
    morning = hour % 12 * 60 + minute
    if time["half"]:
        return {morning + (_HALF_A_DAY if time["half"] in "pP" else 0)}
    return {hour * 60 + minute} if hour > 12 else {morning, morning + _HALF_A_DAY}
