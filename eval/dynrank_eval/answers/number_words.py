"""Number words as digits: "forty-two", "two and a half", "3 quarters", "twice 9", "the square root of 49"."""

import re

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

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
_WORDS = {word: value for value, word in enumerate(_SMALL)}
_WORDS |= {word: 10 * tens for tens, word in enumerate(_TENS, start=2)}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
_PARTS |= {"eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "hundredth": 100}
_PARTS |= {f"{word}th": value for word, value in _WORDS.items() if 13 <= value <= 19}
_PARTS |= {f"{word[:-1]}ieth": value for word, value in _WORDS.items() if value >= 20} | {"thousandth": 1000}
_NUMBER_WORD = "|".join(sorted([*_WORDS, *SCALES, "dozen"], key=len, reverse=True))
_PHRASE = re.compile(
    r"\b(?:an?\s+(?=hundred|thousand|million|billion|dozen))?"
    rf"(?:{_NUMBER_WORD})\b(?:[\s-]+(?:(?<=hundred )and |(?<=thousand )and )?(?:{_NUMBER_WORD})\b)*",
    re.IGNORECASE,
)
_PART_WORD = "|".join(sorted(_PARTS, key=len, reverse=True))
_AND_A_PART = re.compile(rf"\b([0-9]+)[\s-]+and[\s-]+(?:(?:an?|one|1)[\s-]+)?({_PART_WORD})\b", re.IGNORECASE)
_AND_PARTS = re.compile(rf"\b([0-9]+)[\s-]+and[\s-]+([0-9]+)[\s-]+({_PART_WORD})s?\b", re.IGNORECASE)
# Of a thing that can be counted (quarters are coins), only the number that was a word is a part's.
_SOME_PARTS = re.compile(rf"\b([0-9]+)[\s-]+({_PART_WORD})s?\b(?!\s*-)", re.IGNORECASE)
_PARTS_ALONE = re.compile(
    rf"\b([0-9]+)[\s-]+((?!quarter|half\b|third\b)(?:{_PART_WORD}))s?\b(?!\s*-)", re.IGNORECASE
)
_A_PART = re.compile(rf"(?<![0-9] )(?<![0-9])\b(?:an?\s+)?({_PART_WORD})\b", re.IGNORECASE)
_MULTIPLES = {"twice": "2", "double": "2", "thrice": "3", "triple": "3", "half of": "1/2", "half": "1/2"}
_MULTIPLE = re.compile(r"\b(twice|double|thrice|triple|half(?: of)?)\s+(?=[$]?\s*[0-9])", re.IGNORECASE)
_PART_OF = re.compile(rf"\b(?:an?\s+)?({_PART_WORD})\s+of\s+(?=[$]?\s*[0-9])", re.IGNORECASE)
_ROOT = re.compile(r"\b(?:the\s+)?(square|cube)\s+root\s+of\s+(?=[0-9])", re.IGNORECASE)
_POWER = re.compile(r"(?<=[0-9)])\s+(squared|cubed)\b", re.IGNORECASE)
_OPERATORS = {"times": "*", "multiplied by": "*", "plus": "+", "divided by": "/", "over": "/"}
_OPERATOR = re.compile(rf"(?<=[0-9)])\s+({'|'.join(_OPERATORS)})\s+(?=[0-9(-])", re.IGNORECASE)
_FUNCTION = re.compile(r"(?<![A-Za-z\\])(?=(?:log|ln|sin|cos|tan|exp)\s*[_^(]?\s*\{?[0-9])", re.IGNORECASE)


def words_as_digits(text: str) -> str:
    """Return a text whose number words, and operations in words between numbers, are in digits and signs."""
    return _operations(_numbers(text))


def _numbers(text: str) -> str:
    text = _AND_A_PART.sub(lambda m: f"{m[1]} 1/{_PARTS[m[2].lower()]}", text)
    text = _AND_PARTS.sub(lambda m: f"{m[1]} {m[2]}/{_PARTS[m[3].lower()]}", text)
    if re.search("[0-9]", text) and not _PHRASE.match(text.lstrip(" -")):
        return _PARTS_ALONE.sub(lambda m: f"{m[1]}/{_PARTS[m[2].lower()]}", text)
    text = _PHRASE.sub(lambda phrase: str(_value(phrase.group())), text)
    text = _AND_A_PART.sub(lambda m: f"{m[1]} 1/{_PARTS[m[2].lower()]}", text)
    text = _AND_PARTS.sub(lambda m: f"{m[1]} {m[2]}/{_PARTS[m[3].lower()]}", text)
    text = _SOME_PARTS.sub(lambda m: f"{m[1]}/{_PARTS[m[2].lower()]}", text)
    if not re.search("[0-9]", text):
        text = _A_PART.sub(lambda m: f"1/{_PARTS[m[1].lower()]}", text, count=1)
    return text


def _value(phrase: str) -> int:
    total, current = 0, 0
    for word in re.findall("[a-z]+", phrase.lower()):
        if word in _WORDS:
            current += _WORDS[word]
        elif word == "hundred":
            current = max(current, 1) * 100
        elif word == "dozen":
            current = max(current, 1) * 12
        elif word in SCALES:
            total, current = total + max(current, 1) * SCALES[word], 0
    return total + current


def _operations(text: str) -> str:
    text = _ROOT.sub(lambda m: "\\sqrt " if m[1].lower() == "square" else "\\sqrt[3] ", text)
    text = _POWER.sub(lambda m: "^2" if m[1].lower() == "squared" else "^3", text)
    text = _OPERATOR.sub(lambda m: f" {_OPERATORS[m[1].lower()]} ", text)
    text = _MULTIPLE.sub(lambda m: f"{_MULTIPLES[m[1].lower()]} * ", text)
    text = _PART_OF.sub(lambda m: f"1/{_PARTS[m[1].lower()]} * ", text)
    return _FUNCTION.sub(r"\\", text)
