"""Numbers out of answers: a table of what people and models write."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank_eval.extraction import Rule, find_answer, last_boxed, parse_number

MARKER = "The answer is:"
AFTER = (Rule("after", MARKER),)
LADDER = (Rule("boxed"), Rule("after", "answer is"), Rule("last_number"))


def answer_number(completion: str) -> Fraction | None:
    found = find_answer(completion, AFTER)
    return None if found is None else parse_number(found)


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
    assert answer_number(completion) == value


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{5}. The answer is 6", "5"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{(A)}} and \boxed{unclosed", r"\text{(A)}"),
        (r"\boxed 7$", "7"),
        (r"\fbox{8}", "8"),
        ("Hence the final answer is 9.", "9"),
        ("3 apples and 4 pears make 7 fruits", "7"),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_first_rule_that_finds_something_decides(completion: str, answer: str | None) -> None:
    assert find_answer(completion, LADDER) == answer


def test_an_answer_ends_with_its_line_or_its_environment() -> None:
    matrix = "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}"
    assert find_answer(f"The answer is: {matrix}.\nmore", AFTER) == matrix
    assert find_answer("The answer is: $x = 5$.\nThis follows.", AFTER) == "$x = 5$"
    assert find_answer("The answer is: {\n5", AFTER) == "{\n5"


def test_patterns_take_the_first_or_the_last() -> None:
    text = "#### 1,000\n#### 2"
    assert Rule.parse({"pattern": r"#### ([0-9,]+)", "take": "first"}).find(text) == "1,000"
    assert Rule.parse({"pattern": r"#### ([0-9,]+)", "take": "last"}).find(text) == "2"
    assert last_boxed("\\boxed{" * 3) is None


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_every_fraction_reads_back(value: Fraction) -> None:
    assert parse_number(f"{value.numerator}/{value.denominator}") == value


@given(st.integers(-(10**15), 10**15), st.integers(0, 999))
def test_grouped_decimals_read_back(whole: int, thousandths: int) -> None:
    sign = -1 if whole < 0 else 1
    expected = whole + sign * Fraction(thousandths, 1000)
    assert parse_number(f"${whole:,}.{thousandths:03}") == expected


CHARACTERS = "0123456789,./-+$% \\{}frac\n#boxedThe answer is:\u2212é\u2028"


@settings(max_examples=500)
@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    for rules in (AFTER, LADDER):
        answer = find_answer(f"{MARKER} {text}", rules)
        assert answer is None or isinstance(parse_number(answer), Fraction | None)


def test_a_megabyte_is_read_in_no_time() -> None:
    start = time.monotonic()
    bits = ("1,", "9", "-", r"\frac{", " 1 ", r"\boxed{", "$", r"\begin{", "{\n", MARKER, "1/")
    for bit in bits:
        text = bit * (1_000_000 // len(bit))
        for rules in (AFTER, LADDER):
            answer = find_answer(f"{MARKER} {text}", rules)
            parse_number(answer or "")
    assert time.monotonic() - start < 20
