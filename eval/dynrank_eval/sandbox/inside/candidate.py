"""The program's side: runs the solution, then answers what the judge asks of it.

It knows neither the tests nor what they expect.
"""

import itertools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

from wire import Channel, decode, encode

_RESTORABLE = (list, dict, set, bytearray)
_MOST_ITEMS = 1_000_000
# What the judge asks of an object that cannot pass, as Python's own syntax does.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "bool": bool,
    "hash": hash,
    "str": str,
    "items": lambda target: list(itertools.islice(iter(target), _MOST_ITEMS)),
    "contains": operator.contains,
    "item": operator.getitem,
    "equal": lambda first, second: bool(first == second),
    "less": lambda first, second: bool(first < second),
    "less_or_equal": lambda first, second: bool(first <= second),
    "greater": lambda first, second: bool(first > second),
    "greater_or_equal": lambda first, second: bool(first >= second),
}


def serve(solution: str, tolerant: bool, channel: Channel) -> None:
    """Run the solution as a module, then answer until the judge closes the channel."""
    try:
        code = compile(solution, "<solution>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        channel.send({"parsed": False})
        return
    # Before any of its code runs, which could write to the pipe itself.
    channel.send({"parsed": True})
    # Not "__main__": what a solution does only as a script stays undone, as on import.
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    objects = Objects(module)
    channel.send(objects.answer(lambda: run(code, module.__dict__, tolerant)))
    while (message := channel.receive()) is not None:
        channel.send(objects.perform(message))


def run(code: types.CodeType, namespace: dict[str, Any], tolerant: bool) -> None:
    try:
        exec(code, namespace)
    except BaseException:
        # sys.exit() or input() behind the definitions: what was defined before stays defined.
        if not tolerant:
            raise


class Objects:
    """The solution's namespace, and the objects that the judge knows by handle."""

    def __init__(self, module: types.ModuleType) -> None:
        self._kept: list[Any] = [module]

    def perform(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what the judge asks: read or set an attribute (the module is handle 0), or call."""
        target, name = self._kept[message["target"]], message.get("name", "")
        if message["do"] == "get":
            return self.answer(lambda: getattr(target, name))
        arguments = [decode(item, self._kept.__getitem__) for item in message["arguments"]]
        if message["do"] in _OPERATIONS:
            return self.answer(lambda: _OPERATIONS[message["do"]](target, *arguments))
        if message["do"] == "set":
            return self.answer(lambda: setattr(target, name, *arguments))
        named = {key: decode(item, self._kept.__getitem__) for key, item in message["named"].items()}
        reply = self.answer(lambda: target(*arguments, **named))
        # The judge's own lists must change as they would have in one process.
        changed = [
            self._encode(argument) if isinstance(argument, _RESTORABLE) else None for argument in arguments
        ]
        if changed != message["arguments"]:
            reply["changed"] = changed
        return reply

    def answer(self, action: Any) -> dict[str, Any]:
        """Return what came of it.

        exit() and the like end this process, which the judge takes for the solution's end.
        """
        try:
            return {"value": self._encode(action())}
        except Exception as error:
            # The solution's own, of any type: it is reported to the judge, whose tests decide what it means.
            return {"raised": [kind.__name__ for kind in type(error).__mro__]}

    def _encode(self, value: Any) -> Any:
        return encode(value, self._keep)

    def _keep(self, value: Any) -> int:
        for number, kept in enumerate(self._kept):
            if kept is value:
                return number
        self._kept.append(value)
        return len(self._kept) - 1
