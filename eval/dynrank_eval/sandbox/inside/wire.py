"""What passes between the judge and the program: plain data, one JSON line a message.

Only values of Python's own data types cross, and these types themselves. Anything else (functions, classes,
instances) stays in the program's process, and the judge gets a number for it, a handle. So nothing that the
program defines, an `__eq__` that is always true for instance, ever runs in the judge.
"""

import array
import collections
import collections.abc
import datetime
import decimal
import fractions
import json
import os
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

_LONGEST_MESSAGE = 64 << 20
_MOST_ITEMS = 1_000_000
_SMALL_INT = 1 << 63
# Values of these types are rebuilt from their text.
_BY_TEXT: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "int": (int, hex, lambda text: int(text, 16)),
    "complex": (complex, repr, complex),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "Decimal": (decimal.Decimal, str, decimal.Decimal),
    "Fraction": (fractions.Fraction, str, fractions.Fraction),
    "datetime": (
        datetime.datetime,
        datetime.datetime.isoformat,
        datetime.datetime.fromisoformat,
    ),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
}
_SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
# Of iterable types that are rebuilt from their items: the abstract type, and what makes one of a list.
_VIEWS: dict[str, tuple[Any, Callable[[list[Any]], Any]]] = {
    "keys": (collections.abc.KeysView, lambda items: dict.fromkeys(items).keys()),
    "items": (collections.abc.ItemsView, lambda items: dict(items).items()),
    "values": (collections.abc.ValuesView, lambda items: dict(enumerate(items)).values()),
    "deque": (collections.deque, collections.deque),
    "UserList": (collections.UserList, collections.UserList),
}
_DTYPE = re.compile(r"[<>|=]?[biufcU?][0-9]*")
# MBPP's tests hand some to the solution (533).
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
}


class WireError(Exception):
    """A message that is malformed, too long, or holds what cannot cross."""


class Channel:
    """Messages through two pipes."""

    def __init__(self, reader: int, writer: int) -> None:
        self._input = os.fdopen(reader, "rb")
        self._writer = writer

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._writer, data) :]

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None at the end."""
        line = self._input.readline(_LONGEST_MESSAGE)
        if not line:
            return None
        if not line.endswith(b"\n"):
            raise WireError("the message has no end")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise WireError("the message is no object")
        return message


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """Return `value` for JSON; `keep` gives the handle of an object that cannot cross.

    Instances of subclasses (Counter, namedtuple, IntEnum) cross as the base type, which equals them.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and -_SMALL_INT < value < _SMALL_INT:
        return int(value)
    if isinstance(value, float):
        return float(value)
    for kind, base in _SEQUENCES.items():
        if isinstance(value, base):
            return {
                "kind": kind,
                "value": [encode(item, keep) for item in base.__iter__(value)],
            }
    if isinstance(value, types.MappingProxyType | collections.UserDict):
        value = dict(value)
    if isinstance(value, dict):
        pairs = [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]
        return {"kind": "dict", "value": pairs}
    for kind, (base, text, _) in _BY_TEXT.items():
        if isinstance(value, base):
            return {"kind": kind, "value": text(value)}
    for name, type_ in _TYPES.items():
        if value is type_:
            return {"kind": "type", "value": name}
    if isinstance(value, range):
        return {"kind": "range", "value": [value.start, value.stop, value.step]}
    if type(value).__module__ == "numpy" and isinstance(getattr(value, "shape", None), tuple):
        return _encode_numpy(value, keep)
    if isinstance(value, array.array):
        return {"kind": "array", "value": [value.typecode, value.tolist()]}
    if isinstance(value, memoryview):
        return {"kind": "bytes", "value": value.tobytes().hex()}
    for kind, (base, _) in _VIEWS.items():
        if isinstance(value, base):
            return {"kind": kind, "value": [encode(item, keep) for item in _bounded(iter(value))]}
    if isinstance(value, Iterator):
        return {
            "kind": "iterator",
            "value": [encode(item, keep) for item in _bounded(value)],
        }
    return {"kind": "handle", "value": keep(value)}


def _encode_numpy(value: Any, keep: Callable[[Any], int]) -> Any:
    if not value.shape:
        return encode(value.item(), keep)
    if not _DTYPE.fullmatch(value.dtype.str):
        return {"kind": "handle", "value": keep(value)}
    return {"kind": "ndarray", "value": [value.dtype.str, encode(value.tolist(), keep)]}


def _bounded(items: Iterator[Any]) -> Iterator[Any]:
    for count, item in enumerate(items):
        if count == _MOST_ITEMS:
            raise WireError("the iterator has too many items")
        yield item


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """Return the value that `encode` was given; `resolve` gives the object of a handle."""
    if not isinstance(data, dict):
        return data
    kind, value = data["kind"], data["value"]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item, resolve) for item in value)
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in value}
    if kind in _BY_TEXT:
        return _BY_TEXT[kind][2](value)
    if kind == "type":
        return _TYPES[value]
    if kind == "range":
        return range(*value)
    if kind in _VIEWS:
        return _VIEWS[kind][1]([decode(item, resolve) for item in value])
    if kind == "array":
        return array.array(value[0], value[1])
    if kind == "ndarray" and _DTYPE.fullmatch(value[0]):
        import numpy

        return numpy.array(decode(value[1], resolve), dtype=value[0])
    if kind == "iterator":
        return iter([decode(item, resolve) for item in value])
    if kind == "handle":
        return resolve(value)
    raise WireError(f"there is no kind {kind!r}")
