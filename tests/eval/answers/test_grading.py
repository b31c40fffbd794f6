"""MATH answers compared by value; math-verify only where a value cannot be read, and guarded."""

import pytest

from dynrank_eval import verification
from dynrank_eval.answers import grading
from dynrank_eval.answers.grading import grade
from dynrank_eval.verification import Equality

EQUAL = [
    ("7", "7.0"),
    ("7", "x = 7"),
    ("7", "7 \\text{ ways}"),
    ("\\frac{3}{8}", "(3)/(8)"),
    ("\\frac 38", "0.375"),
    ("3\\frac{1}{2}", "7/2"),
    ("\\sqrt{3}", "√3"),
    ("5\\sqrt{3}", "\\sqrt{75}"),
    ("5\\sqrt{3}", "5\\sqrt(3)"),
    ("1/3^{70}", "3^{-70}"),
    (".0000431", "4.31 \\times 10^{-5}"),
    ("6!", "720"),
    ("\\binom{6}{2}", "15"),
    ("\\log_2 32", "5"),
    ("\\sin 30^\\circ", "1/2"),
    ("31_7", "31_{7}"),
    ("31_{7}", "31_{\\text{seven}}"),
    ("21\\text{ cm}^2", "21 square centimeters"),
    ("21\\text{ cm}^2", "21"),
    ("75\\%", "75"),
    ("\\$75", "75"),
    ("75^\\circ", "75 degrees"),
    ("43,210", "43210"),
    ("43 210", "43210"),
    ("x^2-4", "(x-2)(x+2)"),
    ("y=3x+1", "y-3x=1"),
    ("y=3x+1", "3x+1"),
    ("3,-4", "-4, 3"),
    ("\\{3,4\\}", "\\{4,3\\}"),
    ("2\\pm\\sqrt{3}", "2+\\sqrt{3}, 2-\\sqrt{3}"),
    ("[3,4)\\cup(5,\\infty)", "[3, 4) \\cup (5, \\infty)"),
    ("x \\in [3,4]", "[3,4]"),
    ("\\begin{pmatrix} 3 \\\\ 4 \\end{pmatrix}", "\\begin{pmatrix}3\\\\8/2\\end{pmatrix}"),
    ("\\text{(B)}", "B"),
    ("\\text{Odd}", "odd"),
    ("12", "twelve"),
    ("21", "10 + 11 = 21"),
    ("21", "AB = 21"),
    ("21", "m + n = 10 + 11 = 21"),
    ("21", "f(3) = 21"),
    ("21", "\\angle A = 21^\\circ"),
    ("21", "\\text{the answer is } 21"),
    ("31_7", "31 base 7"),
    ("31_7", "31 \\text{ (base seven)}"),
    ("31_7", "(31)_7"),
    ("31_7", "31_{(7)}"),
    ("\\frac{1}{6}", "0.1\\overline{6}"),
    ("0.\\overline{45}", "\\frac{5}{11}"),
    ("\\frac{1}{3}", "0.333..."),
    ("\\frac{3}{4}", "75\\%"),
    ("x \\le 3", "3 \\ge x"),
    ("x > 3", "(3, \\infty)"),
    ("[-3,4)", "-3 \\le x < 4"),
    ("(-\\infty,3)\\cup(4,\\infty)", "x<3 \\text{ or } x>4"),
    ("[3,4)\\cup(4,5]", "4 < x \\le 5, 3 \\le x < 4"),
    ("\\text{(B)}", "(B) 21"),
    ("\\text{(B)}", "B. 21"),
    ("6!", "6!"),
    ("10", "C(5,2)"),
    ("(3,4)", "(x, y) = (3, 4)"),
    ("(3,4)", "x = 3, y = 4"),
    ("10", "{5 \\choose 2}"),
    ("\\text{4:45 p.m.}", "4:45 PM"),
    ("\\text{4:45 p.m.}", "16:45"),
    ("4:45\\text{ p.m.}", "4:45"),
    ("4:45", "4:45 p.m."),
    ("\\text{12:45 a.m.}", "00:45"),
    ("\\text{4 p.m.}", "4:00 pm"),
    ("3:4", "3 to 4"),
    ("3:4", "3 \\text{ to } 4"),
    ("\\frac{5}{8}", "5 out of 8"),
]
DIFFERENT = [
    ("1/3^{70}", "1/3^{71}"),
    ("\\frac{1}{1990!}", "\\frac{1}{1991!}"),
    (".0000431", ".0000432"),
    ("31_7", "31"),
    ("31_7", "31_8"),
    ("31", "31_7"),
    ("5", "5\\sqrt(3)"),
    ("21\\text{ cm}^2", "21\\text{ cm}^3"),
    ("21\\text{ cm}", "21\\text{ m}"),
    ("43", "43 210"),
    ("\\frac{1}{3}", "0.333333"),
    ("3", "3, 4"),
    ("(3,4)", "(4,3)"),
    ("[3,4)", "(3,4)"),
    ("6-5i", "6+5i"),
    ("y=3x+1", "3x-y+2=0"),
    ("\\text{(B)}", "(C)"),
    ("\\text{odd}", "even"),
    ("21", "10 + 11 = 22"),
    ("31_7", "31 base 8"),
    ("0.\\overline{45}", "0.45"),
    ("\\frac{1}{3}", "0.333"),
    ("\\frac{3}{4}", "70\\%"),
    ("x \\le 3", "x < 3"),
    ("x \\le 3", "x \\ge 3"),
    ("x > 3", "(-\\infty, 3)"),
    ("(-\\infty,3)\\cup(4,\\infty)", "x<3 \\text{ or } x \\ge 4"),
    ("(-\\infty,3)\\cup(4,\\infty)", "x<3"),
    ("3", "x \\ge 3"),
    ("3", "\\ge 3"),
    ("3", "3 \\text{ or more}"),
    ("3", "at least 3"),
    ("x \\ge 3", "3"),
    ("\\text{(B)}", "(C) 21"),
    ("6", "6!"),
    ("11", "C(5,2)"),
    ("(3,4)", "x = 4, y = 3"),
    ("3:4", "4:3"),
    ("3:4", "4 to 3"),
    ("\\text{4:45 p.m.}", "4:45 a.m."),
    ("\\text{4:45 p.m.}", "5:45 p.m."),
    ("\\text{12:45 a.m.}", "12:45 p.m."),
    ("\\frac{5}{8}", "5 out of 9"),
    ("\\begin{pmatrix} 3 \\\\ 4 \\end{pmatrix}", "\\begin{pmatrix} 3 \\\\ 5 \\end{pmatrix}"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_values(gold: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        verification, "compare", lambda pairs: [pytest.fail("math-verify was asked") for _ in pairs]
    )
    (found,) = grade([(gold, answer)])
    assert found.equality is Equality.EQUAL and found.grader in ("text", "value")


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_values(gold: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify accepts several of these."""
    monkeypatch.setattr(
        verification, "compare", lambda pairs: [pytest.fail("math-verify was asked") for _ in pairs]
    )
    (found,) = grade([(gold, answer)])
    assert found.equality is Equality.DIFFERENT


def test_math_verify_is_believed_only_where_the_numerals_are_the_golds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verification, "compare", lambda pairs: [Equality.EQUAL for _ in pairs])
    assert grading.verification.compare is verification.compare
    found = grade([("a \\equiv 5", "5 \\equiv a"), ("a \\equiv 5", "6 \\equiv a")])
    assert [each.equality for each in found] == [Equality.EQUAL, Equality.DIFFERENT]
    assert {each.grader for each in found} == {"math_verify"}
