r"""The classic string comparison of MATH answers (Hendrycks et al. 2021), `is_equiv` of MetaMath's util.py.

Every published MATH score before symbolic graders rests on it, so it normalises exactly what the original does and
nothing more: 0.5 equals \frac{1}{2}, but 0.25 does not equal \frac{1}{4}.
"""

import re


def equivalent(first: str, second: str) -> bool:
    """Whether both answers read the same once normalised; where normalising fails, the raw texts are compared."""
    try:
        return normalise(first) == normalise(second)
    except _MalformedError:
        return first == second


class _MalformedError(Exception):
    """LaTeX on which the original's normalisation raises."""


def normalise(text: str) -> str:
    """Return one spelling for the variants of an answer that the original treats as equal."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    text = _without_unit(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _slash_as_fraction(text)


def _without_unit(text: str) -> str:
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise _MalformedError
    return parts[0]


def _braced_roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    for part in rest:
        if not part:
            raise _MalformedError
        first += "\\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:])
    return first


def _braced_fractions(text: str) -> str:
    r"""Put braces around each argument of one character: \frac12, \frac1{72}."""
    result, *rest = text.split("\\frac")
    for part in rest:
        if not part:
            raise _MalformedError
        result += "\\frac"
        if part[0] == "{":
            result += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            result += "{" + part[0] + "}" + part[1:]
        else:
            result += "{" + part[0] + "}{" + part[1] + "}" + part[2:]
    return result


def _slash_as_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    if not all(re.fullmatch(r"\s*[-+]?[0-9]+(_[0-9]+)*\s*", part) for part in parts):
        # The original stops here with int()'s exception, and compares the raw texts.
        raise _MalformedError
    plain = all(str(int(part)) == part for part in parts)
    return "\\frac{" + parts[0] + "}{" + parts[1] + "}" if plain else text
