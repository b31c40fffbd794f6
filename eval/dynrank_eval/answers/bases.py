r"""Numbers in other bases than ten, as answers spell them: 52_8, (52)_{8}, 52_{\text{eight}}, 52 (base 8)."""

import re

from dynrank_eval.answers.arithmetic import UnreadableError

_NAMES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
}
_NAMES |= {"ten": "10"}
_NUMBER = re.compile(
    r"(?P<digits>[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\s*_\s*\{?\s*(?:\\text\s*\{\s*)?(?P<base>[0-9]+|[a-z]+)\s*\}*"
)
_IN_WORDS = re.compile(
    r"(?P<digits>[0-9A-Z]+(?:\.[0-9A-Z]+)?)\s*(?:\\text\s*\{\s*)?[(,]?\s*(?:in\s+)?base[- ]*(?P<base>[0-9]+|[a-z]+)"
    r"\s*[)}]*",
    re.IGNORECASE,
)
_BRACKETED_DIGITS = re.compile(r"(?:\\text\s*)?[({]\s*([0-9A-Z]+)\s*[)}]\s*_")
_BRACKETED_BASE = re.compile(r"_\s*\{\s*\(\s*([0-9]+)\s*\)\s*\}")


def in_a_base(text: str) -> "re.Match[str] | None":
    """Return the digits and the base of a number that says its base; None where it does not."""
    text = text.strip()
    if words := _IN_WORDS.fullmatch(text):
        return words
    text = _BRACKETED_BASE.sub(r"_{\1}", _BRACKETED_DIGITS.sub(r"\1_", text))
    return _NUMBER.fullmatch(text.strip("()"))


def same_in_base(gold: str, answer: str) -> bool:
    """Whether both say the same digits in the same base; a number in another base than ten says so: 52 is not 52_8."""
    written = [match for text in (gold, answer) if (match := in_a_base(text)) is not None]
    if len(written) < 2:
        # Both could be symbols, as x_1.
        if any(match["base"].isalpha() and match["base"].lower() not in _NAMES for match in written):
            raise UnreadableError
        return False
    first, second = (
        (match["digits"].lstrip("0"), _NAMES.get(match["base"].lower(), match["base"])) for match in written
    )
    return first == second
