"""The tests' side: runs them on stand-ins for what the solution defines, and reports the verdict."""

import builtins
from collections.abc import Iterator
from typing import Any

from wire import Channel, WireError, decode, encode


class SolutionEnded(BaseException):
    """The solution left (exit(), a crash); no test can catch it by mistake."""


def verdicts(prelude: str, names: list[str], tests: list[str], channel: Channel) -> Iterator[str]:
    """Yield "test passed" for each test source that passed, then "passed", "unparsable" or "failed"."""
    solution = Solution(channel)
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        if not solution.parses():
            yield "unparsable"
            return
        solution.start()
        exec(compile(prelude, "<prelude>", "exec"), namespace)
        for name in names:
            namespace[name] = solution.named(name)
        for unit in tests:
            exec(compile(unit, "<tests>", "exec"), namespace)
            yield "test passed"
    except (Exception, SolutionEnded):
        # An assertion, the solution's own error, a message that made no sense: the tests did not pass.
        yield "failed"
        return
    yield "passed"


class Solution:
    """Asks the other process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def parses(self) -> bool:
        """Whether the solution is valid Python: the first message, sent before any of its code runs.

        No later message can say so: a solution that forges messages stays wrong.
        """
        message = self._channel.receive()
        if message is None:
            raise SolutionEnded
        return message == {"parsed": True}

    def start(self) -> None:
        """Wait until the solution has been imported."""
        self._answer()

    def named(self, name: str) -> Any:
        """Return what the solution calls `name`."""
        return self.ask(do="get", target=0, name=name)

    def ask(self, **message: Any) -> Any:
        self._channel.send(message)
        return self._answer()

    def call(self, target: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        encoded = [encode(argument, _handle) for argument in arguments]
        encoded_named = {key: encode(value, _handle) for key, value in named.items()}
        self._channel.send({"do": "call", "target": target, "arguments": encoded, "named": encoded_named})
        return self._answer(arguments)

    def _answer(self, arguments: tuple[Any, ...] = ()) -> Any:
        reply = self._channel.receive()
        if reply is None:
            raise SolutionEnded
        for mine, theirs in zip(arguments, reply.get("changed", ()), strict=False):
            if theirs is not None:
                _restore(mine, decode(theirs, self._stand_in))
        if "raised" in reply:
            raise _exception(reply["raised"])
        return decode(reply["value"], self._stand_in)

    def _stand_in(self, handle: int) -> "StandIn":
        return StandIn(self, int(handle))


class StandIn:
    """An object of the solution's, which stays there: what Python asks of it is asked over the channel."""

    __slots__ = ("_handle", "_solution")

    def __init__(self, solution: Solution, handle: int) -> None:
        object.__setattr__(self, "_solution", solution)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._solution.call(self._handle, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._solution.ask(do="get", target=self._handle, name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._solution.ask(do="set", target=self._handle, name=name, arguments=[encode(value, _handle)])

    def _operation(self, name: str, *operands: Any) -> Any:
        encoded = [encode(operand, _handle) for operand in operands]
        return self._solution.ask(do=name, target=self._handle, arguments=encoded)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items())

    def _items(self) -> list[Any]:
        items = self._operation("items")
        if type(items) is not list:
            raise WireError("the items are no list")
        return items

    def __len__(self) -> int:
        return int(self._operation("len"))

    def __bool__(self) -> bool:
        return self._operation("bool") is True

    def __str__(self) -> str:
        return str(self._operation("str"))

    def __contains__(self, item: Any) -> bool:
        return self._operation("contains", item) is True

    def __getitem__(self, key: Any) -> Any:
        return self._operation("item", key)

    def __lt__(self, other: Any) -> bool:
        return self._operation("less", other) is True

    def __le__(self, other: Any) -> bool:
        return self._operation("less_or_equal", other) is True

    def __gt__(self, other: Any) -> bool:
        return self._operation("greater", other) is True

    def __ge__(self, other: Any) -> bool:
        return self._operation("greater_or_equal", other) is True

    def __eq__(self, other: object) -> bool:
        """Compare as the solution says; with plain data only where its items are the data's as well."""
        if isinstance(other, StandIn):
            return other._handle == self._handle or self._operation("equal", other) is True
        if (
            not isinstance(other, (list, tuple, set, frozenset, dict))
            or self._operation("equal", other) is not True
        ):
            return False
        items = self._items()
        return items == list(other) if isinstance(other, (list, tuple)) else set(items) == set(other)

    def __hash__(self) -> int:
        return int(self._operation("hash"))


def _handle(value: Any) -> int:
    if isinstance(value, StandIn):
        return value._handle
    raise WireError(f"a {type(value).__name__} cannot cross to the solution")


def _restore(mine: Any, theirs: Any) -> None:
    """Give the judge's container the content that the solution left in its copy."""
    if isinstance(mine, (list, bytearray)):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)):
        mine.clear()
        mine.update(theirs)


def _exception(names: list[str]) -> BaseException:
    """Return the nearest built-in exception to the one that the solution raised."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind()
    return SolutionEnded()
