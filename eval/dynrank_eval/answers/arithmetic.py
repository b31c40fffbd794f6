"""Arithmetic on values: exact on Fractions where the result is rational, else with mpmath to 60 digits."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

MP = mpmath.MPContext()
MP.dps = 60
"""A context of its own: the precision of the process stays as it is."""
# A larger power or factorial is no benchmark's answer, and would take long.
_MOST_BITS = 200_000
_LARGEST_FACTORIAL = 10_000

Value = Any
"""A Fraction, or an mpmath number."""


class UnreadableError(Exception):
    """A text that is no expression of the grammar, or an operation without a value."""


def numeric(value: Value) -> Any:
    """Return the value as a number of `MP`."""
    if isinstance(value, Fraction):
        return MP.mpf(value.numerator) / MP.mpf(value.denominator)
    return value


def real(value: Value) -> Any:
    number = numeric(value)
    if isinstance(number, MP.mpc):
        raise UnreadableError
    return number


def combined(operation: Callable[[Any, Any], Any], first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return operation(first, second)
    return operation(numeric(first), numeric(second))


def divided(above: Value, below: Value) -> Value:
    if below == 0:
        raise UnreadableError
    if isinstance(above, Fraction) and isinstance(below, Fraction):
        return above / below
    return numeric(above) / numeric(below)


def raised(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
        if abs(exponent.numerator) * size > _MOST_BITS:
            raise UnreadableError
        if base == 0 and exponent <= 0:
            raise UnreadableError
        return base**exponent.numerator
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator <= 64:
        return raised(root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    if base == 0:
        raise UnreadableError
    return MP.power(numeric(base), numeric(exponent))


def root(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or degree < 2:
        raise UnreadableError
    n = degree.numerator
    if isinstance(value, Fraction):
        above, below = _whole_root(abs(value.numerator), n), _whole_root(value.denominator, n)
        if above is not None and below is not None and (value >= 0 or n % 2):
            return Fraction(above, below) * (1 if value >= 0 else -1)
    number = numeric(value)
    if not isinstance(number, MP.mpc) and number < 0 and n % 2:
        return -MP.root(-number, n)
    return MP.root(number, n)


def _whole_root(value: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // n + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**n <= value else (low, middle - 1)
        root = low
    return root if root**n == value else None


def factorial(value: Value) -> Fraction:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _LARGEST_FACTORIAL:
        raise UnreadableError
    return Fraction(math.factorial(value.numerator))


def binomial(n: Value, k: Value) -> Fraction:
    if any(
        not isinstance(v, Fraction) or v.denominator != 1 or not 0 <= v <= _LARGEST_FACTORIAL for v in (n, k)
    ):
        raise UnreadableError
    return Fraction(math.comb(n.numerator, k.numerator))


def logarithm(value: Value, base: Value) -> Value:
    """Return the logarithm, exact where `value` is a whole power of `base`."""
    if isinstance(value, Fraction) and isinstance(base, Fraction) and value > 0 and base > 0 and base != 1:
        nearest = Fraction(int(MP.nint(MP.log(numeric(value), numeric(base)))))
        if raised(base, nearest) == value:
            return nearest
    return MP.log(numeric(value), numeric(base))
