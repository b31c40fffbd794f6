"""Answers out of completions: where the answer stands, and numbers in it, exactly."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

# Western (1,234,567) and Indian (12,34,567) grouping, plain, and decimals without a leading zero.
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_ANSWER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)])[-+])?"
    r"(?:(?:US)?[$€£¥₹]\s*(?P<inner_sign>[-+])?)?"
    rf"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/\s*[0-9]))?(?P<number>{_NUMBER})"
    rf"(?:\s*/\s*(?P<denominator>{_NUMBER}))?"
)
# int() refuses beyond 4300 digits; no benchmark's answer comes near this.
_LONGEST_NUMBER = 200
# Looking for the last of something reads from the end, and never more than this many characters.
_LONGEST_TAIL = 20_000


@dataclass(frozen=True)
class Rule:
    r"""One way to find where the answer stands.

    Attributes:
        kind: "after" a marker (its last occurrence), "pattern" (a regular expression), "boxed" (the
            last \boxed{...} or \fbox{...}) or "last_number".
        text: the marker or the expression.
        first: of a pattern's matches the first is meant, not the last.
    """

    kind: str
    text: str = ""
    first: bool = False

    @classmethod
    def parse(cls, written: str | dict[str, Any]) -> "Rule":
        """Make a rule of what stands in a protocol's file."""
        if isinstance(written, str):
            return cls(written)
        kind = "after" if "after" in written else "pattern"
        return cls(kind, written[kind], written.get("take") == "first")

    def find(self, completion: str) -> str | None:
        """Return the text that holds the answer; None where the rule finds none."""
        if self.kind == "boxed":
            return last_boxed(completion)
        if self.kind == "after":
            return _after(completion, self.text)
        if self.kind == "last_number":
            matches = list(_ANSWER.finditer(without_latex(completion[-_LONGEST_TAIL:])))
            return matches[-1].group() if matches else None
        found = list(re.finditer(self.text, completion[-_LONGEST_TAIL:]))
        if not found:
            return None
        match = found[0 if self.first else -1]
        return next((group for group in match.groups() if group), match.group())


def find_answer(completion: str, rules: Sequence[Rule]) -> str | None:
    """Return what the first rule that finds something finds, without surrounding space and full stop."""
    for rule in rules:
        text = rule.find(completion)
        if text is not None:
            stripped = text.strip()
            stripped = stripped.removesuffix(".").rstrip()
            return stripped or None
    return None


def _after(completion: str, marker: str) -> str | None:
    place = completion.rfind(marker)
    if place < 0:
        return None
    lines = completion[place + len(marker) :].lstrip(" \t\r\n:").split("\n")
    answer = lines[0]
    for line in lines[1:]:
        if not _is_open(answer):
            break
        answer += "\n" + line
    return answer[:_LONGEST_TAIL]


def _is_open(text: str) -> bool:
    r"""Whether a brace or \begin{...} has no end: the answer goes on in the next line."""
    return len(text) < _LONGEST_TAIL and (
        text.count("{") > text.count("}") or text.count("\\begin") > text.count("\\end")
    )


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete \boxed{...} (or \fbox{...}, or "\boxed 5") holds; None where there is none."""
    for place in _places_from_the_end(text, ("\\boxed", "\\fbox")):
        start = place + len("\\boxed" if text.startswith("\\boxed", place) else "\\fbox")
        tail = text[start : start + _LONGEST_TAIL]
        inside = tail.lstrip()
        if not inside.startswith("{"):
            bare = re.match(r"\s+([^\s$]+)", tail)
            if bare:
                return bare.group(1)
            continue
        end = balanced_end(inside)
        if end is not None:
            return inside[1:end]
    return None


def _places_from_the_end(text: str, words: tuple[str, ...]) -> list[int]:
    places = [match.start() for match in re.finditer("|".join(map(re.escape, words)), text)]
    # A completion that repeats itself to its end: the last few are enough.
    return places[::-1][:20]


def balanced_end(text: str) -> int | None:
    """Return the place of the brace that closes the one that `text` begins with; None where none does."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return place
    return None


def parse_number(text: str) -> Fraction | None:
    """Read the first number in `text`: sign, grouping commas, decimals, fractions and mixed numbers, LaTeX.

    Currency signs, percent signs and units beside the number are passed over, so "50%" is 50. None where no
    number is found, a denominator is 0, or the number has more than 200 characters.
    """
    match = _ANSWER.search(without_latex(text[:_LONGEST_TAIL]))
    if match is None or len(match.group()) > _LONGEST_NUMBER:
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


def without_latex(text: str) -> str:
    """Write LaTeX's numbers as plain text does: fractions with a slash, no boxes, no thin spaces."""
    for minus in ("\N{MINUS SIGN}", "\N{EN DASH}"):
        text = text.replace(minus, "-")
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("\\,", "")
    text = re.sub(r"(?<=[0-9])\s*\\[dt]?frac", r" \\frac", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])", r"\1/\2", text)
    return re.sub(r"\\(?:boxed|text|mathrm)\s*\{", "", text).replace("**", "")
