"""EvalPlus' rule of comparison (0.3.1, eval/__init__.py and eval/_special_oracle.py).

This source is also handed to the judge's process, where it runs before the tests: it imports nothing of the package.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

_SAME_AS_SETS = [
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
]
# Their references return match objects.
_ONLY_WHETHER_NONE = ("check_str", "text_match_three", "text_starta_endb")


def load(source: str, entry_point: str) -> Callable[..., Any]:
    namespace: dict[str, Any] = {"__name__": "reference"}
    exec(compile(source, "<reference>", "exec"), namespace)
    function: Callable[..., Any] = namespace[entry_point]
    return function


def check(
    solution: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: list[list[Any]],
    task: str,
    entry_point: str,
    tolerance: float,
) -> None:
    """Raise AssertionError at the first input whose result is not accepted.

    Called once for the original's inputs and once for the added ones.
    """
    allowed = tolerance
    for given in inputs:
        result = solution(*copy.deepcopy(given))
        expected = reference(*copy.deepcopy(given))
        if task == "humaneval_plus" and entry_point == "find_zero":
            assert abs(_polynomial(given[0], result)) <= tolerance
            continue
        # As in EvalPlus, a tolerance once given to floats stays for the part's further inputs.
        allowed = with_floats(allowed, expected)
        assert accepted(result, expected, given, task, entry_point, allowed), given


def with_floats(tolerance: float, expected: Any) -> float:
    """Return the tolerance of a task that names none, once it expects floats."""
    return 1e-6 if tolerance == 0 and _is_floats(expected) else tolerance


def accepted(
    result: Any, expected: Any, given: list[Any], task: str, entry_point: str, tolerance: float
) -> bool:
    if task == "mbpp_plus" and entry_point in _ONLY_WHETHER_NONE:
        # EvalPlus' data hold whether the reference's result is None.
        expected = expected is not None
        exact = expected == (result if isinstance(result, bool) else result is not None)
    elif task == "mbpp_plus" and entry_point in _SAME_AS_SETS:
        exact = set(result) == set(expected)
    else:
        exact = result == expected or (
            task == "mbpp_plus" and _accepts_too(result, given, entry_point, tolerance)
        )
    if exact:
        return True
    return tolerance != 0 and type(result) is type(expected) and _close(result, expected, tolerance)


def _accepts_too(result: Any, given: list[Any], entry_point: str, tolerance: float) -> bool:
    """Whether a task takes the result though it is not the reference's."""
    rules: dict[str, Callable[[], bool]] = {
        "are_equivalent": lambda: True,
        "sum_div": lambda: bool(result == 0),
        "surface_Area": lambda: bool(abs(result - _surface(*given)) <= tolerance),
        "digit_distance_nums": lambda: bool(result == _digit_distance(*given)),
    }
    return entry_point in rules and rules[entry_point]()


def _is_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _close(result: Any, expected: Any, tolerance: float) -> bool:
    """Whether nested lists of numbers are close, as numpy.allclose with rtol 1e-7 finds."""
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(result, (list, tuple))
            and len(result) == len(expected)
            and all(_close(r, e, tolerance) for r, e in zip(result, expected, strict=True))
        )
    if isinstance(expected, float) and math.isinf(expected):
        return bool(result == expected)
    return bool(abs(result - expected) <= tolerance + 1e-7 * abs(expected))


def _polynomial(coefficients: list[float], x: Any) -> float:
    return sum(coefficient * math.pow(x, power) for power, coefficient in enumerate(coefficients))


def _surface(base_edge: float, height: float) -> int:
    """Compute a square pyramid's surface, with the height from the base to the apex (Mbpp/581)."""
    slant = math.sqrt((base_edge / 2) ** 2 + height**2)
    return round(base_edge**2 + 4 * (base_edge * slant) / 2)


def _digit_distance(first: int, second: int) -> int:
    """Sum the differences of the digits, the shorter number filled up with zeros (Mbpp/558)."""
    width = max(len(str(first)), len(str(second)))
    pairs = zip(str(first).zfill(width), str(second).zfill(width), strict=True)
    return sum(abs(int(a) - int(b)) for a, b in pairs)
