r"""Compares two answers of MATH by value: exactly where both are rational, else at random points to 30 digits.

Tuples, intervals, sets, lists, matrices, equations and \pm are compared part by part. Number bases and units belong
to the value. What the grammar does not know is not decided here.
"""

import random
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from dynrank_eval.answers.arithmetic import MP, UnreadableError, numeric
from dynrank_eval.answers.bases import in_a_base, same_in_base
from dynrank_eval.answers.clock import same_time
from dynrank_eval.answers.expressions import Expression
from dynrank_eval.answers.plain import plain
from dynrank_eval.answers.ranges import is_inequality, same_range
from dynrank_eval.extraction import balanced_end

_LONGEST = 1_000
_POINTS = 3
_TOLERANCE = MP.mpf(10) ** -30
_GREEK = "alpha beta gamma delta theta lambda mu phi omega sigma rho tau epsilon varphi psi xi eta zeta kappa nu chi"
_LETTERS = [*"abcdfghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", *(f"\\{name}" for name in _GREEK.split())]
_ENVIRONMENT = re.compile(
    r"\\begin\{(?:[pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end\{(?:[pbvBV]?matrix|array)\}", re.DOTALL
)
_UNIT = re.compile(
    r"(?:\\text\s*\{\s*(?P<text>[^{}]*?)\s*\}|(?<=[0-9}) ])\s*(?P<word>[A-Za-z]{2,}(?:[ /.-][A-Za-z]+)*)\.?)"
    r"\s*(?P<power>\^\s*\{?[0-9]\}?)?\s*$"
)
_ABBREVIATIONS = {
    "centimeter": "cm",
    "centimetre": "cm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "millimeter": "mm",
    "foot": "ft",
    "feet": "ft",
    "inche": "in",
    "inch": "in",
    "yard": "yd",
    "mile": "mi",
    "hour": "h",
    "hr": "h",
    "minute": "min",
    "second": "s",
    "sec": "s",
    "gram": "g",
    "kilogram": "kg",
    "dollar": "",
    "degree": "",
    "unit": "",
    "percent": "",
    "deg": "",
}
_NAME_BEFORE = re.compile(
    r"^\s*(?:\([A-Za-z](?:\s*,\s*[A-Za-z])+\)"
    r"|(?:\\text\s*\{\s*)?[A-Za-z](?:_\{?[0-9A-Za-z]\}?|'|\([A-Za-z]\))?\s*\}?)\s*(?:=|\\in(?![a-z]))\s*(?=\S)"
)
_WRAPPER = re.compile(r"\\(?:boxed|fbox|text)\s*\{")
_TRIGONOMETRIC = re.compile(r"\\(?:arc)?(?:sin|cos|tan|sec|csc|cot)")
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*")
_NAMED_PARTS = re.compile(r"[A-Za-z]\s*=[^=,]+(?:,\s*[A-Za-z]\s*=[^=,]+)+")
# What an equation's left side may be where the right side is the answer: AB, f(3), |AB|, m + n, \\angle A.
_NAME = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|\\(?:angle|triangle|overline|max|min|gcd|lcm)(?![A-Za-z])|[A-Za-z]+\([0-9., -]+\)"
    r"|[A-Za-z]_\{?[0-9A-Za-z]\}?|[A-Za-z'|\[\](){} +-])+"
)
_COMBINATIONS = re.compile(r"(?<![A-Za-z\\])C\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)")
_LEAD_IN = re.compile(r"^\\text\s*\{[^{}]*(?:\bis|:)\s*\}\s*(?=\S)")
_RATIO = re.compile(r"[0-9.]+(?:\s*:\s*[0-9.]+)+")
# "3 to 4" and "5 out of 8", the words in \text or not.
_TO = re.compile(r"(?<=[0-9])\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=[0-9])")
_OUT_OF = re.compile(r"(?<=[0-9])\s*(?:\\text\s*\{\s*out of\s*\}|\bout of\b)\s*(?=[0-9])")
# "(C) 12" and "C. 12".
_CHOSEN = re.compile(r"(?:\\text\s*\{\s*)?\(?([A-Z])[).:]\s*\}?\s*\S")
_CHOICE = re.compile(r"\s*\(?\s*(?:\\text\s*\{)?\s*\(?([A-Z])\)?\s*\}?\s*\)?\s*")


def same_value(gold: str, answer: str) -> bool | None:
    """Return whether the answer has the gold's value; None where one of them cannot be read as a value.

    Both in the form that `normal_answer` gives.
    """
    if gold == answer:
        return True
    if len(gold) > _LONGEST or len(answer) > _LONGEST:
        return None
    try:
        return _same(gold, answer, 0)
    except (UnreadableError, ArithmeticError, ValueError, TypeError, RecursionError):
        return None


def normal_answer(answer: str) -> str:
    r"""Return an answer without math delimiters, boxes, its variable's name, and the full stop of its sentence."""
    text = plain(answer).strip()
    text = re.sub(r"\\[\[\]]|\\[()](?![A-Za-z])|\$\$?", " ", text).strip()
    text = re.sub(
        r"\\begin\{(align|equation|gather)\*?\}|\\end\{(align|equation|gather)\*?\}", " ", text
    ).strip()
    while (match := _WRAPPER.match(text)) and balanced_end(text[match.end() - 1 :]) == len(
        text
    ) - match.end():
        text = text[match.end() : -1].strip()
    text = _LEAD_IN.sub("", text)
    text = re.sub(r"\.\.\.\s*$", r"\\ldots", text).rstrip(".,; \n").strip()
    if not _TRIGONOMETRIC.search(text):
        text = _DEGREE.sub(" ", text)
    text = re.sub(
        r"\s+(?:and|or)\s+(?!(?:more|less|fewer|greater|above|below)\b)|\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}",
        ", ",
        text,
    )
    text = _COMBINATIONS.sub(r"\\binom{\1}{\2}", text)
    return re.sub(r"\s+", " ", text).strip()


def _same(gold: str, answer: str, depth: int) -> bool:
    if depth > 6:
        raise UnreadableError
    gold, answer = without_name(_tuple_of_names(gold, answer), _tuple_of_names(answer, gold))
    if (same := same_time(gold, answer)) is not None:
        return same
    gold, answer = (_OUT_OF.sub("/", text) for text in (gold, answer))
    if ":" in gold + answer:
        gold, answer = (_TO.sub(":", text) for text in (gold, answer))
    if _RATIO.fullmatch(gold) and _RATIO.fullmatch(answer):
        return re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer)
    gold, answer = _last_side(gold, answer), _last_side(answer, gold)
    if (choice := _CHOICE.fullmatch(gold)) and (other := _CHOICE.fullmatch(answer) or _CHOSEN.match(answer)):
        return choice[1] == other[1]
    if in_a_base(gold) or in_a_base(answer):
        return same_in_base(gold, answer)
    if is_inequality(gold) or is_inequality(answer):
        if any(_is_number(text) for text in (gold, answer)):
            return False
        return same_range(gold, answer, lambda a, b: _same(a, b, depth + 1))
    if gold.endswith("%") is not answer.endswith("%"):
        # 50 % is 50 where percent are asked for, and one half.
        number, percent = (answer, gold) if gold.endswith("%") else (gold, answer)
        inside = percent.removesuffix("%")
        return any(_same(number, each, depth + 1) for each in (inside, f"({inside})/100"))
    gold, gold_unit = _unit(gold)
    answer, answer_unit = _unit(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    if _ENVIRONMENT.fullmatch(gold) or _ENVIRONMENT.fullmatch(answer):
        return _same_matrix(gold, answer, depth)
    expanded = [_both_signs(text) for text in (gold, answer)]
    if "," in gold + answer or any(len(each) > 1 for each in expanded):
        return _same_parts(expanded, depth)
    if "\\cup" in gold or "\\cup" in answer:
        parts = [re.split(r"\\cup(?![a-z])", text) for text in (gold, answer)]
        return len(parts[0]) == len(parts[1]) and all(
            _same(a.strip(), b.strip(), depth + 1) for a, b in zip(*parts, strict=True)
        )
    if gold.count("=") == 1 and answer.count("=") == 1:
        return _same_equation(gold, answer)
    return _same_number(_thousands(gold), _thousands(answer))


def without_name(gold: str, answer: str) -> tuple[str, str]:
    """Take "x =" from both where only one has an equation, or both name the same variable."""
    names = [_NAME_BEFORE.match(text) for text in (gold, answer)]
    rest = [text[name.end() :] if name else text for text, name in zip((gold, answer), names, strict=True)]
    if (
        names[0]
        and names[1]
        and names[0].group().split("=")[0].strip() != names[1].group().split("=")[0].strip()
    ):
        return gold, answer
    if any("=" in text for text in rest):
        return gold, answer
    return rest[0], rest[1]


def _tuple_of_names(text: str, other: str) -> str:
    """Return "x=2, y=3" as (2, 3) where the other answer is a tuple, and the names stand in its order."""
    if not _encloses(other) or not _NAMED_PARTS.fullmatch(text):
        return text
    names, values = zip(*(part.split("=") for part in text.split(",")), strict=True)
    return f"({','.join(values)})" if list(names) == sorted(names, key=str.strip) else text


def _last_side(text: str, other: str) -> str:
    """Return 18 of "9 + 9 = 18" and of "AB = 18" where the other answer is no equation.

    Each side before the last is a name or has no letters: of "2x + 1 = 0" nothing is taken.
    """
    if "=" not in text or "=" in other:
        return text
    *sides, last = (side.strip() for side in text.split("="))
    return (
        last
        if all(_NAME.fullmatch(side) or (_constant(side) and _constant(last)) for side in sides)
        else text
    )


def _is_number(text: str) -> bool:
    try:
        return isinstance(_evaluate(text, 0), Fraction)
    except (UnreadableError, ArithmeticError, ValueError):
        return False


def _constant(text: str) -> bool:
    return re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)) is None


def _unit(text: str) -> tuple[str, str]:
    """Split a quantity into its number and its unit in one spelling; "" where it has none."""
    text = text.strip()
    percent = text.removesuffix("%")
    if percent != text:
        return percent.strip(), ""
    match = _UNIT.search(text)
    if (
        match is None
        or not text[: match.start()].strip()
        or not re.search(r"[0-9}\)]\s*$", text[: match.start()])
    ):
        return re.sub(r"^\$|(?<=[(\[,])\s*\$", "", text), ""
    words = (match["text"] if match["text"] is not None else match["word"]).lower().replace(".", "")
    singular = [word.removesuffix("s") if len(word) > 2 else word for word in re.findall("[a-z]+", words)]
    power = re.sub(r"[^0-9]", "", match["power"] or "")
    powers = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
    power = next((powers[word] for word in singular if word in powers), power)
    unit = " ".join(_ABBREVIATIONS.get(word, word) for word in singular if word not in powers).strip()
    return text[: match.start()].strip(), unit + power if unit else ""


def _same_matrix(gold: str, answer: str, depth: int) -> bool:
    matches = [_ENVIRONMENT.fullmatch(text) for text in (gold, answer)]
    if matches[0] is None or matches[1] is None:
        raise UnreadableError
    rows = [
        [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[1]) if row.strip()]
        for match in matches
        if match
    ]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return False
    pairs = [pair for a, b in zip(*rows, strict=True) for pair in zip(a, b, strict=True)]
    return all(_same(a.strip(), b.strip(), depth + 1) for a, b in pairs)


def _both_signs(text: str) -> list[str]:
    if "\\pm" not in text:
        return [text]
    return [text.replace("\\pm", "+", 1), text.replace("\\pm", "-", 1)]


def _same_parts(expanded: Sequence[list[str]], depth: int) -> bool:
    """Compare tuples and intervals in order, sets and lists in any order."""
    kinds, parts = [], []
    for variants in expanded:
        whole = variants[0].strip()
        bracketed = len(variants) == 1 and len(whole) > 1 and _encloses(whole)
        if bracketed and not re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", whole[1:-1]):
            opening = 2 if whole.startswith("\\{") else 1
            kinds.append((whole[:opening], whole[-1]))
            parts.append(_split(whole[opening:-opening]))
        else:
            kinds.append(("", ""))
            parts.append([part for variant in variants for part in _split(variant)])
    unordered = [kind in (("", ""), ("\\{", "}")) for kind in kinds]
    if kinds[0] != kinds[1] and not all(unordered):
        if any(unordered) and len(parts[0]) != len(parts[1]):
            return False
        if not any(unordered):
            return False
        raise UnreadableError
    if len(parts[0]) != len(parts[1]):
        return False
    if len(parts[0]) == 1 and kinds[0] == ("", ""):
        return _same_number(_thousands(parts[0][0]), _thousands(parts[1][0]))
    if not unordered[0]:
        return all(_same(a, b, depth + 1) for a, b in zip(*parts, strict=True))
    rest = list(parts[1])
    for part in parts[0]:
        place = next((n for n, other in enumerate(rest) if _same(part, other, depth + 1)), None)
        if place is None:
            return False
        del rest[place]
    return True


def _encloses(text: str) -> bool:
    """Whether the first bracket of `text` closes with its last character; half-open intervals count."""
    if not (text.startswith(("(", "[", "\\{")) and text.endswith((")", "]", "}"))):
        return False
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character != "\\" and place < len(text) - 1:
            return False
    return depth == 0


def _split(text: str) -> list[str]:
    """Split at commas outside brackets, but not at those of 1,234; a space after the comma separates always."""
    parts, depth, start = [], 0, 0
    grouped = re.fullmatch(r"\s*-?\$?\s*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?\s*", text)
    if grouped:
        return [text.strip()]
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def _thousands(text: str) -> str:
    return re.sub(r"(?<=[0-9]),\s?(?=[0-9]{3}(?![0-9]))", "", text)


def _same_equation(gold: str, answer: str) -> bool:
    """Whether two equations have the same solutions: the differences of their sides are proportional."""
    ratios = []
    for point in range(_POINTS):
        differences = []
        for text in (gold, answer):
            left, right = (_evaluate(side, point) for side in text.split("="))
            differences.append(numeric(left) - numeric(right))
        if abs(differences[1]) < _TOLERANCE:
            raise UnreadableError
        ratios.append(differences[0] / differences[1])
    return all(abs(ratio - ratios[0]) <= _TOLERANCE * max(1, abs(ratios[0])) for ratio in ratios)


def _same_number(gold: str, answer: str) -> bool:
    for point in range(_POINTS):
        first, second = _evaluate(gold, point), _evaluate(answer, point)
        if isinstance(first, Fraction) and isinstance(second, Fraction):
            return first == second
        a, b = numeric(first), numeric(second)
        if MP.isinf(a) or MP.isinf(b):
            return bool(a == b)
        if abs(a - b) > _TOLERANCE * max(abs(a), abs(b)):
            return False
    return True


def _evaluate(text: str, point: int) -> Any:
    """Evaluate the whole text with random values, the same for a point, for its variables."""
    draw = random.Random(point)
    values: dict[str, Any] = {letter: MP.mpf(draw.randint(10**8, 10**9)) / 10**8 for letter in _LETTERS}
    values["e"], values["i"] = +MP.e, MP.mpc(0, 1)
    expression = Expression(text, values)
    value = expression.value()
    if not expression.at_end():
        raise UnreadableError
    return value
