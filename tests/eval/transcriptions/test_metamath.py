"""MetaMath's reading of numbers against a transcription, line by line: there is no package."""

import re
from fractions import Fraction

from dynrank_eval.transcriptions import metamath
from tests.eval.transcriptions.replies import number_replies


def plain_metamath(completion: str) -> int | None:
    """extract_answer_number of eval_gsm8k.py."""
    parts = completion.split("The answer is: ")
    if len(parts) <= 1:
        return None
    match = re.search(r"[\-+]?\d*[\.,/]?\d+", parts[-1].strip())
    if not match:
        return None
    text = match.group()
    if "/" in text:
        denominator, numerator = text.split("/")[1], text.split("/")[0]
        try:
            float(denominator), float(numerator)
        except ValueError:
            return None
        if denominator == "0":
            return round(float(numerator.replace(",", "")))
        fraction = Fraction(text.replace(",", ""))
        return round(float(fraction.numerator / fraction.denominator))
    value = float(text.replace(",", ""))
    return None if value == float("inf") else round(value)


def test_metamaths_numbers() -> None:
    golds = ["18", "1,234", "-3", "0.5", "72000"] * 100
    texts = [text for row in number_replies(golds, 40) for text in row]
    assert [text for text in texts if metamath.extract_number(text) != plain_metamath(text)] == []
    assert sum(metamath.extract_number(text) is not None for text in texts) > 1000
