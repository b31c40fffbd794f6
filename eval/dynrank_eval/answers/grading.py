"""Grades MATH answers: by value where both can be read as values, else by math-verify, guarded.

math-verify drops what it cannot parse (number bases, units, a root's argument) and rounds to 6 places, so it accepts
some wrong answers. It is asked only about what `same_value` cannot read, and believed only where the answer holds
the gold's numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dynrank_eval import verification
from dynrank_eval.answers.mathvalues import normal_answer, same_value, without_name
from dynrank_eval.answers.numbers import read_number
from dynrank_eval.verification import Equality

_NUMERAL = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_WORD = re.compile(r"[A-Za-z]{4,}(?:[ -][A-Za-z]+)*")


@dataclass(frozen=True)
class Grade:
    """Whether an answer equals the gold, and what decided: "text", "value" or "math_verify"."""

    equality: Equality
    grader: str


def grade(pairs: Sequence[tuple[str, str]]) -> list[Grade]:
    """Grade (gold, answer) pairs."""
    grades = [without_math_verify(normal_answer(gold), normal_answer(answer)) for gold, answer in pairs]
    open_ = [place for place, found in enumerate(grades) if found is None]
    asked = verification.compare([(normal_answer(pairs[p][0]), normal_answer(pairs[p][1])) for p in open_])
    for place, equality in zip(open_, asked, strict=True):
        if equality is Equality.EQUAL and not _same_figures(*pairs[place]):
            equality = Equality.DIFFERENT
        grades[place] = Grade(equality, "math_verify")
    return [found for found in grades if found is not None]


def without_math_verify(gold: str, answer: str) -> Grade | None:
    """Return the grade of two answers in normal form by text or value; None where only math-verify can tell."""
    gold, answer = without_name(gold, answer)
    if _as_text(gold) == _as_text(answer):
        return Grade(Equality.EQUAL, "text")
    if _WORD.fullmatch(gold) or _WORD.fullmatch(answer):
        numbers = [read_number(text) for text in (gold, answer)]
        if all(number is not None and number.values for number in numbers):
            return Grade(Equality.EQUAL if numbers[0] == numbers[1] else Equality.DIFFERENT, "value")
        return Grade(Equality.DIFFERENT, "text")
    same = same_value(gold, answer)
    return None if same is None else Grade(Equality.EQUAL if same else Equality.DIFFERENT, "value")


def _as_text(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).replace(" ", "").lower()
    return re.sub(r"(?<=[0-9])([ap])\.m\.?", r"\1m", text)


def _same_figures(gold: str, answer: str) -> bool:
    """Whether both hold the same numerals and as many minus signs."""
    texts = [normal_answer(text).replace(",", "") for text in (gold, answer)]
    numerals = [sorted([*_NUMERAL.findall(text), *re.findall("-", text)]) for text in texts]
    return numerals[0] == numerals[1]
