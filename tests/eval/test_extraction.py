"""Numbers out of answers: a table of what people and models write."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_eval.extraction import answer_number, parse_number

MARKER = "The answer is:"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.", 18),
        ("-7", -7),
        ("+7", 7),
        ("\N{MINUS SIGN}7", -7),
        ("1,234,567", 1234567),
        ("1,23,456", 123456),
        ("1{,}234", 1234),
        ("1,5", 1),
        ("2.4", Fraction(12, 5)),
        (".5", Fraction(1, 2)),
        ("1,234.50", Fraction(2469, 2)),
        ("3/4", Fraction(3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("2 1/2 cups", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("1.5/3", Fraction(1, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"$\boxed{42}$", 42),
        (r"$\boxed{-42}$", -42),
        ("50%", 50),
        (r"50\%", 50),
        ("$5", 5),
        (r"\$5.50", Fraction(11, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("US$1,000", 1000),
        ("€ 12", 12),
        ("12 apples", 12),
        ("60 km/h", 60),
        ("x = 9", 9),
        ("**18**", 18),
        ("7/0", None),
        ("none", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_number(text: str, value: Fraction | int | None) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("2 + 2 = 4. The answer is: 4", 4),
        ("The answer is: 3. No. The answer is: 4", 4),
        ("The answer is:4", 4),
        ("The answer is:\n4", 4),
        ("The answer is: 4\n\n5 apples", 4),
        ("The answer is: unclear\n5", None),
        ("The answer is 4", None),
        ("#### 4", None),
        ("", None),
        ("The answer is:", None),
    ],
)
def test_answer_after_the_last_marker(completion: str, value: int | None) -> None:
    assert answer_number(completion, MARKER) == value


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_every_fraction_reads_back(value: Fraction) -> None:
    assert parse_number(f"{value.numerator}/{value.denominator}") == value


@given(st.integers(-(10**15), 10**15), st.integers(0, 999))
def test_grouped_decimals_read_back(whole: int, thousandths: int) -> None:
    sign = -1 if whole < 0 else 1
    expected = whole + sign * Fraction(thousandths, 1000)
    assert parse_number(f"${whole:,}.{thousandths:03}") == expected


@settings(max_examples=500)
@given(st.text(alphabet="0123456789,./-+$% \\{}frac\n", max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    result = answer_number(f"{MARKER} {text}", MARKER)
    assert result is None or isinstance(result, Fraction)


def test_a_megabyte_is_read_in_no_time() -> None:
    for text in ("1," * 500_000, "9" * 1_000_000, "-" * 1_000_000, r"\frac{" * 160_000, " 1 " * 300_000):
        answer_number(f"{MARKER} {text}", MARKER)
