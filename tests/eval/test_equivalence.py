"""MATH answers: the classic string rule, and math-verify behind its deadline."""

import time

import pytest

from dynrank_eval import verification
from dynrank_eval.equivalence import equivalent
from dynrank_eval.verification import Equality


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        # Cases of the original's own test (hendrycks/math, modeling/math_equivalence.py).
        (r"\frac{1}{2}", r"\frac12", True),
        (r"\tfrac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac1{72}", r"\frac{1}{72}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("0.25", r"\frac{1}{4}", False),
        ("1/2", r"\frac{1}{2}", True),
        ("01/2", r"\frac{1}{2}", False),
        ("x/y", r"\frac{x}{y}", False),
        ("x/y", "x/y", True),
        (r"10\text{ cm}", "10", True),
        (r"10\text{cm}", "10", False),
        (r"50\%", "50", True),
        (r"\$5", "5", True),
        (r"90^\circ", "90", True),
        ("x=5", "5", True),
        ("xyz=5", "5", False),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (".5", "0.5", True),
        ("5", "5.0", False),
        ("1,000", "1000", False),
        (r"\sqrt", r"\sqrt", True),
        (r"\frac", r"\frac1", False),
        ("", "", True),
    ],
)
def test_the_string_rule(first: str, second: str, equal: bool) -> None:
    assert equivalent(first, second) is equal
    assert equivalent(second, first) is equal


def test_math_verify_knows_values_and_is_killed_when_late() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    endless = "2003^{2002^{2001}}"
    pairs = [
        ("0.25", r"\frac{1}{4}"),
        ("1", "2"),
        (endless, endless + "+1"),
        ("x^2-1", "(x-1)(x+1)"),
        ("5", "no answer"),
    ]
    start = time.monotonic()
    results = verification.compare(pairs, deadline=3.0)
    assert results[0] is results[3] is Equality.EQUAL
    assert results[1] is results[4] is Equality.DIFFERENT
    assert results[2] in (Equality.TIMEOUT, Equality.DIFFERENT)
    assert time.monotonic() - start < 60


def test_no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    stuck = "import sys, time\nprint('ready', flush=True)\nfor line in sys.stdin:\n    time.sleep(600)"
    monkeypatch.setattr(verification, "_SCRIPT", stuck)
    assert verification.compare([("1", "1"), ("2", "2")], deadline=0.2) == [Equality.TIMEOUT] * 2
