"""Numbers from the text of an answer, exactly."""

import re
from fractions import Fraction

# Western (1,234,567) and Indian (12,34,567) grouping, plain, and decimals without a leading zero.
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_ANSWER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)])[-+])?"
    r"(?:(?:US)?[$€£¥₹]\s*(?P<inner_sign>[-+])?)?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/\s*[0-9]))?(?P<number>{_NUMBER})"
    rf"(?:\s*/\s*(?P<denominator>{_NUMBER}))?"
)
# int() refuses beyond 4300 digits; no benchmark's answer comes near this.
_LONGEST = 200


def answer_number(completion: str, marker: str) -> Fraction | None:
    """The number in the line after the last `marker`, or None where there is none to read."""
    _, found, tail = completion.rpartition(marker)
    if not found:
        return None
    lines = tail.strip().splitlines()
    return parse_number(lines[0]) if lines else None


def parse_number(text: str) -> Fraction | None:
    """The first number in `text`: sign, grouping commas, decimals, fractions and mixed numbers, LaTeX.

    Currency signs, percent signs and units beside the number are passed over, so "50%" is 50. None where no
    number is found, a denominator is 0, or the number has more than 200 characters.
    """
    match = _ANSWER.search(_without_latex(text))
    if match is None or len(match.group()) > _LONGEST:
        return None
    value = _exact(match["number"])
    if match["denominator"]:
        divisor = _exact(match["denominator"])
        if divisor == 0:
            return None
        value /= divisor
    if match["whole"]:
        value += int(match["whole"])
    negative = "-" in (match["sign"], match["inner_sign"])
    return -value if negative else value


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _without_latex(text: str) -> str:
    for minus in ("\N{MINUS SIGN}", "\N{EN DASH}"):
        text = text.replace(minus, "-")
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"(?<=[0-9])\s*\\[dt]?frac", r" \\frac", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    return re.sub(r"\\(?:boxed|text|mathrm)\s*\{", "", text).replace("**", "")
