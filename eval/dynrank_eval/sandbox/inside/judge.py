"""The tests' side: runs them on stand-ins for what the solution defines, and reports the verdict."""

import builtins
from typing import Any

from wire import Channel, WireError, decode, encode


class SolutionEnded(BaseException):
    """The solution left (exit(), a crash); no test can catch it by mistake."""


class Unparsable(SolutionEnded):
    """The solution is no valid Python."""


def verdict(prelude: str, names: list[str], tests: list[str], channel: Channel) -> str:
    """ "passed", "unparsable", or "failed" whatever the reason."""
    solution = Solution(channel)
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        solution.start()
        exec(compile(prelude, "<prelude>", "exec"), namespace)
        for name in names:
            namespace[name] = solution.named(name)
        for unit in tests:
            exec(compile(unit, "<tests>", "exec"), namespace)
    except Unparsable:
        return "unparsable"
    except (Exception, SolutionEnded):
        # An assertion, the solution's own error, a message that made no sense: the tests did not pass.
        return "failed"
    return "passed"


class Solution:
    """Asks the other process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def start(self) -> None:
        """Waits until the solution has been imported."""
        self._answer()

    def named(self, name: str) -> Any:
        """What the solution calls `name`."""
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
        if "unparsable" in reply:
            raise Unparsable
        for mine, theirs in zip(arguments, reply.get("changed", ()), strict=False):
            if theirs is not None:
                _restore(mine, decode(theirs, self._stand_in))
        if "raised" in reply:
            raise _exception(reply["raised"])
        return decode(reply["value"], self._stand_in)

    def _stand_in(self, handle: int) -> "StandIn":
        return StandIn(self, int(handle))


class StandIn:
    """An object of the solution's. Equal only to itself; everything else happens over there."""

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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandIn) and other._handle == self._handle

    def __hash__(self) -> int:
        return hash(self._handle)


def _handle(value: Any) -> int:
    if isinstance(value, StandIn):
        return value._handle
    raise WireError(f"a {type(value).__name__} cannot cross to the solution")


def _restore(mine: Any, theirs: Any) -> None:
    """Gives the judge's container the content that the solution left in its copy."""
    if isinstance(mine, (list, bytearray)):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)):
        mine.clear()
        mine.update(theirs)


def _exception(names: list[str]) -> BaseException:
    """The nearest built-in exception to the one that the solution raised."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind()
    return SolutionEnded()
