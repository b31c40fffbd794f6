"""MBPP+ inputs as they were before JSON (EvalPlus 0.3.1, data/mbpp.py: mbpp_deserialize_inputs)."""

from collections.abc import Callable
from typing import Any

_Arguments = list[Any]


def mbpp_input(number: int, given: _Arguments) -> _Arguments:
    """Return the arguments of one call of the MBPP problem `number`."""
    return _CONVERTERS.get(number, list)(given)


def _each_a_tuple(given: _Arguments) -> _Arguments:
    return [tuple(argument) for argument in given]


def _items_tuples(given: _Arguments) -> _Arguments:
    return [[tuple(item) for item in argument] for argument in given]


def _tuple_of_tuples(given: _Arguments) -> _Arguments:
    return [tuple(tuple(item) for item in argument) for argument in given]


def _first_a_tuple(given: _Arguments) -> _Arguments:
    return [tuple(given[0]), *given[1:]]


def _all_the_way_down(given: Any) -> Any:
    return tuple(map(_all_the_way_down, given)) if isinstance(given, list) else given


_GROUPS: list[tuple[str, Callable[[_Arguments], _Arguments]]] = [
    (
        "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
        _each_a_tuple,
    ),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", _items_tuples),
    ("75 413 444 753", lambda given: [[tuple(item) for item in given[0]], given[1]]),
    ("106 750", lambda given: [given[0], tuple(given[1])]),
    # An empty set became {}, which stays a dict in EvalPlus too.
    ("115", lambda given: [[set(item) if isinstance(item, list) and item else {} for item in given[0]]]),
    ("124", lambda given: [float(given[0]), complex(given[1])]),
    ("250 307 405 446 617 720 763 808", _first_a_tuple),
    ("259 401 445", _tuple_of_tuples),
    ("278", lambda given: [tuple(tuple(i) if isinstance(i, list) else i for i in given[0])]),
    ("722", lambda given: [{key: tuple(value) for key, value in given[0].items()}, *given[1:]]),
    ("252", lambda given: [complex(given[0])]),
    ("580 615 791", lambda given: [_all_the_way_down(argument) for argument in given]),
]
_CONVERTERS = {int(number): converter for numbers, converter in _GROUPS for number in numbers.split()}
