"""Reads the one number that an answer in words gives, exactly; refuses where it gives several."""

import re
from dataclasses import dataclass, field
from fractions import Fraction

from dynrank_eval.answers.arithmetic import UnreadableError
from dynrank_eval.answers.expressions import Expression
from dynrank_eval.answers.number_words import SCALES, words_as_digits
from dynrank_eval.answers.plain import plain

_LONGEST = 2_000
_LONGEST_WRITTEN_BITS = 4_000
_COMMANDS = r"\\(?:frac|sqrt|pi|d?binom|log|ln|lg|sin|cos|tan|exp|lfloor|lceil)(?![A-Za-z])"
_START = re.compile(
    r"(?<![A-Za-z0-9_.])[-+]?\s*[$]?\s*[-+]?\s*"
    rf"(?:(?=[0-9(.]|{_COMMANDS}|sqrt\b)(?!\.(?![0-9]))(?!\([^0-9\\-])|(?<=[-+])(?=\{{[0-9])|(?=\|-?[0-9.]+\|))"
)
_REMARK = re.compile(
    r"\s*(?:,|;|\.(?=\s|$))?\s*\b(?:(?:which|because|since|as|where|so|when|while|given|assuming|after|if|but|therefore|"
    r"i\.e)\b|(?:explanation|reasoning|note|check|verification|justification|solution)\s*:)",
    re.IGNORECASE,
)
_WHICH_IS = re.compile(r",?\s*\bwhich (?:is|was|equals|means|makes)\b.*", re.IGNORECASE | re.DOTALL)
_PARENTHESIS = re.compile(r"\s?\((?=[^)]*[A-Za-z=])(?![^)]*\\)[^()]*\)|\{\s*[A-Za-z][A-Za-z ]*\}")
_NEGATED = re.compile(r"(?:\bnot|n't)\s+(?:equal to\s+|exactly\s+)?[$]?\s*[-+]?[0-9][0-9,.]*", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>|<<[^<>]*>>(?=\s*[$]?[0-9])|<<|>>")
_EMPHASIS = re.compile(r"(?<![0-9*)])\*(?=[^\s*])([^*]+)(?<=\S)\*(?![0-9*(])")
_EUROPEAN = re.compile(
    r"(?<![0-9.,])[0-9]{1,3}(?:(?:\.[0-9]{3}){2,}(?:,[0-9]+)?|\.[0-9]{3},[0-9]{1,2})(?![0-9.,]*[0-9])"
)
_CURRENCY = re.compile(r"(?:US|A|C|HK|R)?\$|[€£¥₹₽]|\b(?:USD|EUR|GBP|Rs\.?|INR)(?=[\s\d])")
_AND_CENTS = re.compile(r"\$\s*([0-9]+)\s*(?:,|and|,\s*and)\s*([0-9]{1,2})\s*(?:cents?\b|¢)", re.IGNORECASE)
_SIDES = re.compile(
    r"=>|-+>|=|[⇒→∴]|\\(?:approx|implies|to|therefore|(?:long)?rightarrow|(?:Long)?Rightarrow)(?![A-Za-z])"
)
_SCALE = re.compile(r"\s*(hundred|thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_SCALE_LETTER = re.compile(r"([kKMB])(?![A-Za-z0-9/^])")
_SCALE_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_DOZEN = re.compile(r"\s*dozens?\b", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|percent\b|per cent\b|cents?\b|¢)", re.IGNORECASE)
# Coins and parts alike: 3 quarters are 3, and 3/4.
_COUNTED_PARTS = re.compile(r"\s*-?\s*(half|halve|quarter|third)s?\b", re.IGNORECASE)
_COUNTED_SIZES = {"half": 2, "halve": 2, "quarter": 4, "third": 3}
# Of eight things five, or five eighths of them.
_OUT_OF = re.compile(r"\s*out of\s+(?:the\s+)?([0-9]+)(?![0-9.,/]*[0-9/])", re.IGNORECASE)
_CLOCK = re.compile(r"\s*(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::00)?(?![0-9:])")
_UNIT_WORDS = r"(?:\s*[A-Za-z][A-Za-z/^0-9{}.'-]*){0,4}?"
_ANOTHER = re.compile(
    rf"{_UNIT_WORDS}\s*(?:,\s*(?:and|or)?|;|\band\b|\bor\b|\bto\b|\bthrough\b|\bvs\.?|&|:|~|-(?=\s*\S))\s*"
    r"(?:an?\s+)?[$€£]?\s*[-+]?(?:[0-9.]|\\frac|\\sqrt)"
)
_GOES_ON = re.compile(
    r"\s*\^(?!\\circ|\{\\circ)|[0-9]|i(?![A-Za-z])|(?:[CP]|_)\{?[0-9]"
    rf"|{_UNIT_WORDS}\s*(?:\+|\\pm|\*|\\cdot|\\times|<|>|\\(?:leq?|geq?|lt|gt|neq?)(?![A-Za-z]))\s*[-+]?\s*[$]?"
    r"(?:[0-9.(\\]|(?![aA]\b)[A-Za-z](?![A-Za-z]))"
    rf"|{_UNIT_WORDS}\s*(?:/\s*[0-9(\\]|\b(?:mod|choose)\b|\b(?:more|less|fewer|greater) than\s+[$]?[0-9])"
    rf"|{_UNIT_WORDS}\s*,?\s*\b(?:or|and)\s+(?:more|less|fewer|greater|above|below|over|under|up)\b"
    rf"|{_UNIT_WORDS}\s*,?\s*\bat (?:least|most)\b|\+\s*$"
)
_NOT_EQUAL_TO = re.compile(
    r"(?:\b(?:(?:more|less|greater|fewer|larger|smaller) than|under|over|above|below|beyond|at (?:least|most)|up to)"
    r"|\b(?:minimum|maximum) of|\\(?:leq?|geq?)(?:slant)?|(?<!<)<|(?<![->])>|\^)\s*[{($]*$",
    re.IGNORECASE,
)
_UNREAD = re.compile(r"\\(?:sum|prod|int|lim|max|min|gcd|lcm|arc[a-z]+|[a-z]+h|overline|bar|det)(?![A-Za-z])")
# Of each family the units in the size of its smallest: "2 hours and 30 minutes" is 150 minutes and 2.5 hours.
_COMPOUND = [
    {
        "day": 86400,
        "hour": 3600,
        "hr": 3600,
        "h": 3600,
        "minute": 60,
        "min": 60,
        "m": 60,
        "second": 1,
        "sec": 1,
    },
    {"dollar": 100, "cent": 1},
    {"yard": 36, "foot": 12, "feet": 12, "ft": 12, "inch": 1, "inche": 1, "in": 1},
    {"year": 12, "month": 1},
    {"week": 7, "day": 1},
    {"pound": 16, "lb": 16, "ounce": 1, "oz": 1},
    {"meter": 100, "metre": 100, "m": 100, "centimeter": 1, "centimetre": 1, "cm": 1},
    {"kilogram": 1000, "kg": 1000, "gram": 1, "g": 1},
]
_PART = re.compile(r"\s*(?:,|and\b|,\s*and\b)?\s*([0-9]+(?:\.[0-9]+)?)\s*-?\s*([A-Za-z]+?)s?(?![A-Za-z])")
# The same quantity again in another unit: "2 hours (120 minutes)", "1 week, or 7 days".
_QUANTITY = r"([0-9]+(?:\.[0-9]+)?)\s*-?\s*([A-Za-z]+?)s?"
_RESTATED = re.compile(
    rf"[^0-9]*{_QUANTITY}\s*(?:\(\s*(?:or|i\.e\.,?)?|,?\s+(?:or|i\.e\.,?)\s)\s*{_QUANTITY}[).\s*]*"
)
_AND_A_FRACTION = re.compile(
    r"(?<![0-9.,/])([0-9]+)\s*(?:and|&)\s*(?=[0-9]+\s*/\s*[0-9]|\\frac)", re.IGNORECASE
)
_HYPHEN_FRACTION = re.compile(r"(?<![0-9.,/*+^()-])([0-9]+)-(?=[0-9]+/[0-9]+(?![0-9]))")
_RANGE = re.compile(r"[0-9.,]+\s*-\s*[0-9.,]+")


_LABEL = re.compile(
    r"^\s*(?:(?:[0-9]+[.)]|[-*#>]+)\s+|(?:[#*]+\s*)?(?:step|part)\s+[0-9]+\s*[:.)]\s*)+", re.IGNORECASE
)
_CLOSING_WORDS = re.compile(
    r"\s*(?:please\s+)?"
    r"(?:let me know|feel free|(?:I )?hope (?:this|that) helps|if you (?:have|need|want|would)|would you like)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reading:
    """The values that an answer may mean; none where it gives several numbers, or a number that is not rational.

    More than one value stands for one quantity in several units: 50 % is 50 and 1/2.
    """

    values: frozenset[Fraction] = field(default_factory=frozenset)

    def __str__(self) -> str:
        """Return the value; empty where there is none, or one of more digits than Python writes out (9999!)."""
        value = max(self.values, key=abs, default=Fraction(0))
        long = max(value.numerator.bit_length(), value.denominator.bit_length()) > _LONGEST_WRITTEN_BITS
        return "" if long or not self.values else str(value)


def read_number(text: str) -> Reading | None:
    """Read the first number of an answer, or after its last equals sign; None where the text holds no number.

    Units, currency and percent signs are passed over. Expressions are evaluated: 2 + 3 = 5 is 5, 2^3 is 8,
    1.2e3 is 1200. Lists, ranges, inequalities and what goes on in an unknown way have no value.
    """
    if restated := _restated(text[:_LONGEST]):
        return Reading(restated)
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
        before = text[: start.start()]
        if _NOT_EQUAL_TO.search(before) or _UNREAD.search(before):
            return Reading()
        return _reading(text, start.start(), expression.position, value)
    return None


def last_number(text: str) -> Reading | None:
    """Read the last number of a text without a stated answer: in its last sentence that has one, after "=" if any."""
    for line in reversed(text[-20_000:].split("\n")[-50:]):
        line = _without_label(line)
        for sentence in reversed(re.split(r"(?<=[.!?])\s+", line)):
            if _CLOSING_WORDS.match(sentence):
                continue
            prepared = _right_side(_prepared(sentence[-_LONGEST:].rstrip("! "), remarks=True))
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


def _without_label(line: str) -> str:
    """Return a line without its number in a list; "18. I hope this helps!" is an answer and closing words."""
    label = _LABEL.match(line)
    return line if label is None or _CLOSING_WORDS.match(line, label.end()) else line[label.end() :]


def _prepared(text: str, remarks: bool) -> str:
    """Return the text without delimiters and currency; where `remarks` is False, also without explanations."""
    text = _EMPHASIS.sub(r" \1 ", re.sub(r"(?<![0-9])\.{2,}", " ", plain(_TAG.sub(" ", text))))
    text = re.sub(r"\\(?:boxed|fbox|text)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:boxed|fbox|text)\s*\{", " {", text)
    text = re.sub(r"\\[\[\]()]", " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " ", text).replace("<=", "\\le ").replace(">=", "\\ge ")
    text = _PARENTHESIS.sub(" ", text)
    if remarks:
        shorter = _WHICH_IS.sub("", _NEGATED.sub(" ", text))
        text = shorter if re.search("[0-9]", shorter) or _NEGATED.search(text) else text
    elif (remark := _REMARK.search(text)) and re.search("[0-9]", text[: remark.start()]):
        text = text[: remark.start()]
    text = _EUROPEAN.sub(lambda m: m.group().replace(".", "").replace(",", "."), text)
    text = _AND_CENTS.sub(r"\1 dollars and \2 cents", text)
    text = _CURRENCY.sub(" ", text).replace("$", " ")
    return re.sub(r"\b(?:negative|minus)\s+(?=\S)", "-", text, flags=re.IGNORECASE)


def _right_side(text: str) -> str:
    """Return what follows the last equals sign or arrow, with number words as digits."""
    text = next((side for side in reversed(_SIDES.split(text)) if side.strip()), "")
    text = words_as_digits(text)
    text = _AND_A_FRACTION.sub(r"\1 ", text)
    return _HYPHEN_FRACTION.sub(r"\1 ", text).strip()


def _reading(text: str, start: int, end: int, value: object, alone: bool = False) -> Reading:
    """Return the reading of `value`, which text[start:end] gave, by what follows it.

    alone: what follows has been decided on already; several numbers in a sentence are no list.
    """
    if not isinstance(value, Fraction):
        return Reading()
    if _RANGE.fullmatch(text[start:end].strip()) and not alone:
        return Reading()
    if not alone and (compound := _compound(text[start:])):
        return Reading(compound)
    values, rest = _in_units(value, text[end:])
    if re.match(r"\s*(?:%|percent)?\s*of\s+\$?[0-9]", rest):
        # "10 % of 50", "3/4 of 20": the answer is another number.
        return Reading()
    if _GOES_ON.match(rest) or (not alone and (_ANOTHER.match(rest) or _repeats_otherwise(rest, value))):
        return Reading()
    return Reading(frozenset(values))


def _in_units(value: Fraction, rest: str) -> tuple[set[Fraction], str]:
    """Return what `value` means with the scale, percent or cents that begin `rest`, and what follows them."""
    if scale := _SCALE.match(rest):
        return {value * SCALES[scale[1].lower()]}, rest[scale.end() :]
    if letter := _SCALE_LETTER.match(rest):
        return {value * _SCALE_LETTERS[letter[1]]}, rest[letter.end() :]
    if dozen := _DOZEN.match(rest):
        return {value, value * 12}, rest[dozen.end() :]
    if parts := _COUNTED_PARTS.match(rest):
        return {value, value / _COUNTED_SIZES[parts[1].lower()]}, rest[parts.end() :]
    if (whole := _OUT_OF.match(rest)) and int(whole[1]):
        return {value, value / int(whole[1])}, rest[whole.end() :]
    if percent := _PERCENT.match(rest):
        return {value, value / 100}, rest[percent.end() :]
    return {value}, rest


def _repeats_otherwise(rest: str, value: Fraction) -> bool:
    """Whether a parenthesis with another number follows: "18 (9 + 9)" repeats 18, "18 (20)" does not."""
    if not (opening := re.match(r"\s+\((?=[0-9-])", rest)):
        return False
    expression = Expression(rest, None, opening.end())
    try:
        return bool(expression.value() != value)
    except (UnreadableError, ArithmeticError, ValueError):
        return False


def _restated(text: str) -> frozenset[Fraction]:
    """Return the values of a quantity that is said again in another unit; empty where it is not, or is another."""
    match = _RESTATED.fullmatch(words_as_digits(plain(text)))
    if match is None:
        return frozenset()
    amounts, units = [Fraction(match[1]), Fraction(match[3])], [match[2].lower(), match[4].lower()]
    for family in _COMPOUND:
        if units[0] != units[1] and all(unit in family for unit in units):
            first, second = (amount * family[unit] for amount, unit in zip(amounts, units, strict=True))
            return frozenset(amounts if first == second else ())
    return frozenset()


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
