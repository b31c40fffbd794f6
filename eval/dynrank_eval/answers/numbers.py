"""Reads the one number that an answer in words gives, exactly; refuses where it gives several."""

import re
from dataclasses import dataclass, field
from fractions import Fraction

from dynrank_eval.answers.expressions import Expression, UnreadableError
from dynrank_eval.answers.plain import plain

_LONGEST = 2_000
_START = re.compile(
    r"(?<![A-Za-z0-9_.])[-+]?\s*[$]?\s*[-+]?\s*(?=[0-9(.]|\\frac|\\sqrt|sqrt\b|\\pi)(?!\.(?![0-9]))(?!\([^0-9\\-])"
)
_REMARK = re.compile(
    r"\s*(?:,|;|\.(?=\s|$))?\s*\b(?:which|because|since|as|where|so|when|while|given|assuming|after|if|but|therefore|i\.e)\b",
    re.IGNORECASE,
)
_PARENTHESIS = re.compile(r"\s\((?=[^)]*[A-Za-z=])[^()]*\)")
_CURRENCY = re.compile(r"(?:US|A|C|HK|R)?\$|[€£¥₹₽]|\b(?:USD|EUR|GBP|Rs\.?|INR)(?=[\s\d])")
_DOLLAR_SIGN = re.compile(r"\$(?=\s*[-+]?\s*[0-9.])")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(r"\s*(hundred|thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_DOZEN = re.compile(r"\s*dozens?\b", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|percent\b|per cent\b)", re.IGNORECASE)
_CLOCK = re.compile(r"\s*(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::00)?(?![0-9:])")
_UNIT_WORDS = r"(?:\s*[A-Za-z][A-Za-z/^0-9{}.'-]*){0,4}?"
_ANOTHER = re.compile(
    rf"{_UNIT_WORDS}\s*(?:,\s*(?:and|or)?|;|\band\b|\bor\b|\bto\b|\bthrough\b|\bvs\.?|&|:|~|-(?=\s*\S))\s*"
    r"(?:an?\s+)?[$€£]?\s*[-+]?(?:[0-9.]|\\frac|\\sqrt)"
)
# Of each family the units in the size of its smallest: "2 hours and 30 minutes" is 150 minutes and 2.5 hours.
_COMPOUND = [
    {"day": 86400, "hour": 3600, "hr": 3600, "h": 3600, "minute": 60, "min": 60, "second": 1, "sec": 1},
    {"dollar": 100, "cent": 1},
    {"yard": 36, "foot": 12, "feet": 12, "ft": 12, "inch": 1, "inche": 1, "in": 1},
    {"year": 12, "month": 1},
    {"week": 7, "day": 1},
    {"pound": 16, "lb": 16, "ounce": 1, "oz": 1},
    {"meter": 100, "metre": 100, "m": 100, "centimeter": 1, "centimetre": 1, "cm": 1},
    {"kilogram": 1000, "kg": 1000, "gram": 1, "g": 1},
]
_PART = re.compile(r"\s*(?:,|and\b|,\s*and\b)?\s*([0-9]+(?:\.[0-9]+)?)\s*-?\s*([A-Za-z]+?)s?\b")

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
_SMALL += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_SMALL)} | {
    w: 10 * n for n, w in enumerate(_TENS, start=2)
}
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8}
_PARTS["tenth"] = 10
_NUMBER_WORD = "|".join(sorted([*_WORDS, *_SCALES, "dozen"], key=len, reverse=True))
_PHRASE = re.compile(
    r"\b(?:an?\s+(?=hundred|thousand|million|billion|dozen))?"
    rf"(?:{_NUMBER_WORD})\b(?:[\s-]+(?:(?<=hundred )and |(?<=thousand )and )?(?:{_NUMBER_WORD})\b)*",
    re.IGNORECASE,
)
_PART_WORD = "|".join(sorted(_PARTS, key=len, reverse=True))
_AND_A_PART = re.compile(rf"\b([0-9]+)[\s-]+and[\s-]+(?:(?:an?|one|1)[\s-]+)?({_PART_WORD})\b", re.IGNORECASE)
_AND_PARTS = re.compile(rf"\b([0-9]+)[\s-]+and[\s-]+([0-9]+)[\s-]+({_PART_WORD})s?\b", re.IGNORECASE)
_SOME_PARTS = re.compile(rf"\b([0-9]+)[\s-]+({_PART_WORD})s?\b(?!\s*-)", re.IGNORECASE)
_A_PART = re.compile(rf"(?<![0-9] )(?<![0-9])\b(?:an?\s+)?({_PART_WORD})\b", re.IGNORECASE)
_AND_A_FRACTION = re.compile(
    r"(?<![0-9.,/])([0-9]+)\s*(?:and|&)\s*(?=[0-9]+\s*/\s*[0-9]|\\frac)", re.IGNORECASE
)
_HYPHEN_FRACTION = re.compile(r"(?<![0-9.,/*+^()-])([0-9]+)-(?=[0-9]+/[0-9]+(?![0-9]))")
_RANGE = re.compile(r"[0-9.,]+\s*-\s*[0-9.,]+")


@dataclass(frozen=True)
class Reading:
    """The values that an answer may mean; none where it gives several numbers, or a number that is not rational.

    More than one value stands for one quantity in several units: 50 % is 50 and 1/2.
    """

    values: frozenset[Fraction] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return str(max(self.values, key=abs)) if self.values else ""


def read_number(text: str) -> Reading | None:
    """Read the first number of an answer, or after its last equals sign; None where the text holds no number.

    Units, currency and percent signs are passed over. Expressions are evaluated: 2 + 3 = 5 is 5, 2^3 is 8,
    1.2e3 is 1200. Lists and ranges have no value.
    """
    text = _prepared(text[:_LONGEST], remarks=False)
    if text.count("=") > 1 and re.search(r",\s*(?:and\s+)?[A-Za-z]", text):
        return Reading()
    text = _right_side(text)
    clock = _CLOCK.fullmatch(text) or re.match(
        _CLOCK.pattern + r"\s*(?:[ap]\.?m\b|o'clock|hours|$)", text, re.I
    )
    if clock:
        return Reading(frozenset({Fraction(clock["hour"])}) if clock["minute"] == "00" else frozenset())
    start = _START.search(text)
    while start is not None:
        expression = Expression(text, None, start.start())
        try:
            value = expression.value()
        except (UnreadableError, ArithmeticError, ValueError):
            if re.match(r"\s*[-+]?\s*[0-9]", start.group() + text[start.end() : start.end() + 1]):
                return Reading()
            start = _START.search(text, start.end() + 1)
            continue
        return _reading(text, start.start(), expression.position, value)
    return None


def last_number(text: str) -> Reading | None:
    """Read the last number of a text without a stated answer: in its last sentence that has one, after "=" if any."""
    for line in reversed(text[-20_000:].split("\n")[-50:]):
        line = re.sub(r"^\s*(?:[0-9]+[.)]|[-*#>]+)\s+", "", line)
        for sentence in reversed(re.split(r"(?<=[.!?])\s+", line)):
            prepared = _right_side(_prepared(sentence[-_LONGEST:], remarks=True))
            found, place = None, 0
            while (start := _START.search(prepared, place)) is not None:
                expression = Expression(prepared, None, start.start())
                try:
                    value = expression.value()
                except (UnreadableError, ArithmeticError, ValueError):
                    place = start.end() + 1
                    continue
                found = _reading(prepared, start.start(), expression.position, value, alone=True)
                place = expression.position
            if found is not None:
                return found
    return None


def _prepared(text: str, remarks: bool) -> str:
    """Return the text without delimiters and currency; where `remarks` is False, also without explanations."""
    text = plain(text)
    text = re.sub(r"\\(?:boxed|fbox|text)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:boxed|fbox|text)\s*\{", " {", text)
    text = re.sub(r"\\[\[\]()]", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " ", text)
    text = _PARENTHESIS.sub(" ", text)
    remark = _REMARK.search(text)
    if remark and not remarks and re.search("[0-9]", text[: remark.start()]):
        text = text[: remark.start()]
    text = _CURRENCY.sub(" ", text).replace("$", " ")
    return re.sub(r"\b(?:negative|minus)\s+(?=\S)", "-", text, flags=re.IGNORECASE)


def _right_side(text: str) -> str:
    """Return what follows the last equals sign, with number words as digits."""
    sides = re.split(r"=|\\approx|\\implies|\\Rightarrow|->", text)
    text = next((side for side in reversed(sides) if side.strip()), "")
    text = _words_as_digits(text)
    text = _AND_A_FRACTION.sub(r"\1 ", text)
    return _HYPHEN_FRACTION.sub(r"\1 ", text).strip()


def _words_as_digits(text: str) -> str:
    text = _AND_A_PART.sub(lambda m: f"{m[1]} 1/{_PARTS[m[2].lower()]}", text)
    if re.search("[0-9]", text) and not _PHRASE.match(text.lstrip(" -")):
        return text
    text = _PHRASE.sub(lambda phrase: str(_words_value(phrase.group())), text)
    text = _AND_A_PART.sub(lambda m: f"{m[1]} 1/{_PARTS[m[2].lower()]}", text)
    text = _AND_PARTS.sub(lambda m: f"{m[1]} {m[2]}/{_PARTS[m[3].lower()]}", text)
    text = _SOME_PARTS.sub(lambda m: f"{m[1]}/{_PARTS[m[2].lower()]}", text)
    if not re.search("[0-9]", text):
        text = _A_PART.sub(lambda m: f"1/{_PARTS[m[1].lower()]}", text, count=1)
    return text


def _words_value(phrase: str) -> int:
    total, current = 0, 0
    for word in re.findall("[a-z]+", phrase.lower()):
        if word in _WORDS:
            current += _WORDS[word]
        elif word == "hundred":
            current = max(current, 1) * 100
        elif word == "dozen":
            current = max(current, 1) * 12
        elif word in _SCALES:
            total, current = total + max(current, 1) * _SCALES[word], 0
    return total + current


def _reading(text: str, start: int, end: int, value: object, alone: bool = False) -> Reading:
    """Return the reading of `value`, which text[start:end] gave, by what follows it.

    alone: what follows has been decided on already; several numbers in a sentence are no list.
    """
    if not isinstance(value, Fraction):
        return Reading()
    if _RANGE.fullmatch(text[start:end].strip()) and not alone:
        return Reading()
    rest = text[end:]
    if not alone and (compound := _compound(text[start:])):
        return Reading(compound)
    values = {value}
    if scale := _SCALE.match(rest):
        values, rest = {value * _SCALES[scale[1].lower()]}, rest[scale.end() :]
    elif dozen := _DOZEN.match(rest):
        values, rest = {value, value * 12}, rest[dozen.end() :]
    elif re.match(r"\s*(?:%|percent)?\s*of\s+\$?[0-9]", rest):
        # "10 % of 50", "3/4 of 20": the answer is another number.
        return Reading()
    elif percent := _PERCENT.match(rest):
        values, rest = {value, value / 100}, rest[percent.end() :]
    if re.match(r"\s*\^(?!\\circ|\{\\circ)|[0-9]", rest) or (_ANOTHER.match(rest) and not alone):
        return Reading()
    return Reading(frozenset(values))


def _compound(text: str) -> frozenset[Fraction]:
    """Return a quantity in two units or more (2 hours 30 minutes) in each of them; empty where it is none."""
    parts, place = [], 0
    while part := _PART.match(text, place):
        parts.append((Fraction(part[1]), part[2].lower()))
        place = part.end()
    if len(parts) < 2:
        return frozenset()
    for family in _COMPOUND:
        sizes = [family.get(unit) for _, unit in parts]
        known = [size for size in sizes if size is not None]
        if (
            len(known) == len(parts)
            and known == sorted(known, reverse=True)
            and len(set(known)) == len(known)
        ):
            total = sum((amount * size for (amount, _), size in zip(parts, known, strict=True)), Fraction(0))
            return frozenset(total / size for size in known)
    return frozenset()
