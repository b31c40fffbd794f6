"""lm-evaluation-harness 0.4.13: the filters and the metric of gsm8k and gsm8k_cot, version 3."""

import re

NOTHING = "[invalid]"
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
STRICT_COT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def first(pattern: "re.Pattern[str]", completion: str) -> str:
    """Return what the pattern's group matches first, NOTHING where it does not."""
    match = pattern.search(completion)
    return match[1].strip() if match else NOTHING


def last(pattern: "re.Pattern[str]", completion: str) -> str:
    """Return what the pattern's groups match last, NOTHING where they do not."""
    found = pattern.findall(completion)
    return next((group.strip() for group in found[-1] if group), NOTHING) if found else NOTHING


def exact_match(answer: str, reference: str) -> bool:
    """Whether both texts are equal but for case, commas, dollar signs and a full stop at the end."""
    return _normal(answer) == _normal(reference)


def _normal(text: str) -> str:
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
