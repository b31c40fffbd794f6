"""The number that an answer gives, in the spellings that models use."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_eval.answers.numbers import last_number, read_number

NUMBERS: dict[str, float | Fraction | tuple[float | Fraction, ...]] = {
    "27": 27,
    "+27.": 27,
    "-8": -8,
    "\N{MINUS SIGN}8": -8,
    "\N{NON-BREAKING HYPHEN}8": -8,
    "\N{FIGURE DASH}8": -8,
    "\N{EN DASH}8": -8,
    "\N{SMALL HYPHEN-MINUS}8": -8,
    "\N{FULLWIDTH HYPHEN-MINUS}8": -8,
    "negative 8": -8,
    "minus eight": -8,
    "(-8)": -8,
    "4,321,987": 4321987,
    "4,32,198": 432198,
    "4{,}321": 4321,
    "43 210": 43210,
    "43\N{NO-BREAK SPACE}210": 43210,
    "43\N{THIN SPACE}210": 43210,
    "43\N{NARROW NO-BREAK SPACE}210": 43210,
    "$43\\,210$": 43210,
    "$43\\;210$": 43210,
    "$43~210$": 43210,
    "43'210": 43210,
    "43_210": 43210,
    "4,321.50": Fraction(8643, 2),
    ".75": Fraction(3, 4),
    "4.5e3": 4500,
    "4.5E-1": Fraction(9, 20),
    "$4.5 \\times 10^3$": 4500,
    "4.5 x 10^{3}": 4500,
    "4.5·10³": 4500,
    "3^4": 81,
    "3**4": 81,
    "3⁴": 81,
    "4!": 24,
    "3 / 8": Fraction(3, 8),
    "\\frac{3}{8}": Fraction(3, 8),
    "-\\dfrac38": Fraction(-3, 8),
    "\\cfrac{3}{8}": Fraction(3, 8),
    "\\nicefrac{3}{8}": Fraction(3, 8),
    "3\N{FRACTION SLASH}8": Fraction(3, 8),
    "⅜": Fraction(3, 8),
    "4⅜": Fraction(35, 8),
    "4 3/8 cups": Fraction(35, 8),
    "4-3/8 cups": Fraction(35, 8),
    "4\\frac{3}{8}": Fraction(35, 8),
    "4 and 3/8": Fraction(35, 8),
    "4 and a half": Fraction(9, 2),
    "four and a half": Fraction(9, 2),
    "four-and-a-half hours": Fraction(9, 2),
    "three and three quarters": Fraction(15, 4),
    "one half": Fraction(1, 2),
    "a third": Fraction(1, 3),
    "forty-two dollars": 42,
    "three hundred and seven": 307,
    "seven thousand": 7000,
    "2.5 million people": 2500000,
    "$\\sqrt{64}$": 8,
    "√64": 8,
    "\\sqrt[3]{64}": 4,
    "\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}": 42,
    "\N{ARABIC-INDIC DIGIT FOUR}": 4,
    "**42**": 42,
    "`42`": 42,
    "$\\mathbf{42}$": 42,
    "$\\boxed{-42}$": -42,
    "\\text{42 dollars}": 42,
    "$42.00.": 42,
    "\\$42": 42,
    "-$42": -42,
    "$-42": -42,
    "US$4,200": 4200,
    "€ 42": 42,
    "42 USD": 42,
    "42 km/h": 42,
    "42°": 42,
    "42 times": 42,
    "42%": (42, Fraction(42, 100)),
    "42\\%": (42, Fraction(42, 100)),
    "3 dozen": (3, 36),
    "4:00 PM": 4,
    "4 p.m.": 4,
    "1 hour and 45 minutes": (105, Fraction(7, 4)),
    "7 dollars and 25 cents": (725, Fraction(29, 4)),
    "4 + 5 = 9": 9,
    "x = 9": 9,
    "(4)(5)": 20,
    "18 (which is 2 times 9)": 18,
    "18, because 9 + 9 = 18": 18,
    "she has 18 left": 18,
    "18 dollars a day for 7 days": 18,
    "43{\\,}210": 43210,
    "43\\,{210}": 43210,
    "43\\_210": 43210,
    "43\\mathord{,}210": 43210,
    "43\\hspace{1pt}210": 43210,
    "43\\mkern3mu210": 43210,
    "43&nbsp;210": 43210,
    "4.321.987": 4321987,
    "4.321,50": Fraction(8643, 2),
    "\N{MODIFIER LETTER MINUS SIGN}8": -8,
    "\N{SUBSCRIPT MINUS}8": -8,
    "\N{HYPHEN BULLET}8": -8,
    "-{8}": -8,
    "|-8|": 8,
    "{3 \\over 8}": Fraction(3, 8),
    "3 over 8": Fraction(3, 8),
    "³\N{FRACTION SLASH}₈": Fraction(3, 8),
    "4³\N{FRACTION SLASH}₈": Fraction(35, 8),
    "4 and 3 quarters": Fraction(19, 4),
    "7 tenths": Fraction(7, 10),
    "3 quarters": (3, Fraction(3, 4)),
    "the square root of 64": 8,
    "the cube root of 64": 4,
    "4 squared": 16,
    "7 times 6": 42,
    "twice 21": 42,
    "half of 84": 42,
    "\\binom{9}{2}": 36,
    "\\log_2 32": 5,
    "\\lfloor 4.7 \\rfloor": 4,
    "4k": 4000,
    "$4.5M": 4500000,
    "50 cents": (50, Fraction(1, 2)),
    "$7 and 25 cents": (725, Fraction(29, 4)),
    "1h 45m": (105, Fraction(7, 4)),
    "*42*": 42,
    "<b>42</b>": 42,
    "...42": 42,
    "42(hens)": 42,
    "42 {dollars}": 42,
    "forty-two (42)": 42,
    "42 (40 + 2)": 42,
    "3\N{MULTIPLICATION SIGN} as many": 3,
    "42 Explanation: 40 + 2 = 42": 42,
    "a quarter of 84": 21,
    "3 hours (180 minutes)": (3, 180),
    "two weeks, or 14 days": (2, 14),
    "42 more than before": 42,
    "5 out of 8": (5, Fraction(5, 8)),
    "5 out of the 8 apples": (5, Fraction(5, 8)),
}
NOT_ONE_NUMBER = [
    "4, 5, 6",
    "4-5",
    "4 to 5",
    "4 or 5",
    "between 4 and 5",
    "4 cats and 5 dogs",
    "4:5",
    "4:30",
    "4/0",
]
NOT_ONE_NUMBER += [
    "more than 4",
    "less than 4",
    "under 4",
    "over 4 dollars",
    "above $4$",
    "< 4",
    "x > 4",
    "4 < x",
    "4 \\le x \\le 5",
    "4 ± 5",
    "4 + x",
    "4x + 5",
]
NOT_ONE_NUMBER += [
    "at least 4",
    "at most 4 cats",
    "up to 4",
    "no more than 4",
    "a minimum of 4",
    "≥ 4",
    "x >= 4",
]
NOT_ONE_NUMBER += [
    "\\leqslant 4",
    "4 or more",
    "4 dollars or less",
    "4 and up",
    "4 cats at most",
    "4+",
    "one third of 4",
]
NOT_ONE_NUMBER += ["x^4", "log 4", "\\ln(4)", "4i", "4 mod 3", "4 choose 2", "4C2", "4 less than 5", "4 (5)"]
NOT_ONE_NUMBER += ["\\max(4, 5)", "a=4, b=5", "4,5", "25% of 60", "√2", "9" * 5000, "10^(10^10)"]


@pytest.mark.parametrize(("text", "values"), NUMBERS.items(), ids=lambda value: str(value)[:30])
def test_a_number_is_read_in_every_usual_spelling(
    text: str, values: float | Fraction | tuple[Fraction]
) -> None:
    reading = read_number(text)
    expected = values if isinstance(values, tuple) else (values,)
    assert reading is not None and reading.values == frozenset(map(Fraction, expected))


@pytest.mark.parametrize("text", NOT_ONE_NUMBER, ids=lambda text: text[:20])
def test_several_numbers_and_what_is_not_rational_have_no_value(text: str) -> None:
    reading = read_number(text)
    assert reading is not None and not reading.values


@pytest.mark.parametrize("text", ["", "none", "many", "correct", "\\frac", "$$"])
def test_a_text_without_a_number_has_no_reading(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("43", "43 210"),
        ("3", "3^4"),
        ("4", "4 + 5 = 9"),
        ("64", "√64"),
        ("4", "4½"),
        ("84", "a quarter of 84"),
        ("200", "3 hours (200 minutes)"),
    ],
)
def test_a_misreading_is_no_pass(gold: str, text: str) -> None:
    reading = read_number(text)
    assert reading is not None and Fraction(gold) not in reading.values


def test_a_value_too_long_to_write_out_does_no_harm() -> None:
    for text in ("9999!", "10^{50000}", "1/9999!"):
        reading = read_number(text)
        assert reading is not None and reading.values and str(reading) == ""


def test_the_last_number_of_a_reply_without_a_stated_answer() -> None:
    for text, value in [
        ("So he has 4 + 5 = 9 coins.\nI hope this helps!", 9),
        ("He earns 4 * 5 = $<<4*5=20>>20 a day.", 20),
        ("4 cats and 5 dogs make 9 animals", 9),
        ("1. add 4\n2. so it is 8", 8),
        ("Step 1: 4 + 4 = 8\n**Step 2:** that is all", 8),
        ("18. I hope this helps with problem 3!", 18),
        ("It is 8.\nLet me know if you need help with the other 3 problems!", 8),
    ]:
        reading = last_number(text)
        assert reading is not None and reading.values == {value}
    assert last_number("no idea") is None


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_every_fraction_reads_back(value: Fraction) -> None:
    reading = read_number(f"{value.numerator}/{value.denominator}")
    assert reading is not None and reading.values == {value}


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789,./-+$% \\{}frac^()!\n√½eand:", max_size=50))
def test_no_text_breaks_it(text: str) -> None:
    read_number(text)
    last_number(text)


def test_a_megabyte_is_read_in_seconds() -> None:
    start = time.process_time()
    for bit in ("1,", "9", "-", "\\frac{", " 1 ", "(", "{", "1/", "9!", "2^", "√", "one ", "$", "and "):
        text = bit * (1_000_000 // len(bit))
        read_number(text)
        last_number(text)
    assert time.process_time() - start < 20
