"""MetaMath's eval_gsm8k.py and eval_math.py (github.com/meta-math/MetaMath, revisions 913a0b2 and c393b10)."""

import re
from fractions import Fraction

_MARKER = "The answer is: "
_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")


def extract_number(completion: str) -> int | None:
    """Return the number after the last marker, rounded to a whole one; None where the script finds none.

    It ends at the second comma or point (1,234,567 is 1234), and a denominator of 0 is dropped. Where the script
    ends with an exception (a denominator of 00), the answer counts as missing.
    """
    parts = completion.split(_MARKER)
    match = _NUMBER.search(parts[-1].strip()) if len(parts) > 1 else None
    if match is None:
        return None
    text = match.group().replace(",", "")
    try:
        if "/" not in text:
            return round(float(text))
        numerator, denominator = text.split("/")
        if denominator == "0":
            return round(float(numerator))
        value = Fraction(text)
        return round(value.numerator / value.denominator)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def same_number(reference: str, answer: int) -> bool:
    """Whether the rounded answer is the reference, without its commas."""
    return float(answer) == float(reference.replace(",", ""))


def extract_answer(completion: str) -> str | None:
    """Return the text after the last marker up to a full stop at a line's end; None where there is no marker."""
    parts = completion.split(_MARKER)
    if len(parts) < 2:
        return None
    return parts[-1].split(".\n")[0].strip().removesuffix(".").strip()
