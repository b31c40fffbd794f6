"""What is wrong with a recipe, in one sentence, from pydantic's errors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from dynrank_ds.methods import METHODS
from dynrank_ds.methods.base import MethodConfig
from dynrank_ds.section import Section


def sentence(
    error: ValidationError, values: dict[str, Any], schema: type[Section], source: type[Section]
) -> str:
    """Return the first mistake, how many more there are, and the names of all keys that are missing.

    Args:
        error: of pydantic.
        values: that were checked.
        schema: of the whole recipe.
        source: of one of several sources of data.
    """
    errors = {tuple(_path(one)): one for one in reversed(error.errors())}
    missing = [key for key, one in reversed(errors.items()) if one["type"] == "missing"]
    names = [f"'{name}'" for key in missing for name in _required_keys(key, schema)]
    train = values.get("train")
    if names and not (isinstance(train, dict) and train.keys() & {"steps", "epochs"}):
        names.append("'train.steps' or 'train.epochs'")
    absent = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    wrong = [one for one in reversed(errors.values()) if one["type"] != "missing"]
    if not wrong:
        return absent
    first, others = wrong[0], len(wrong) - 1
    more = (f" (and {others} more)" if others else "") + (f"; {absent}" if names else "")
    return _mistake(first, values, schema, source) + more


def _required_keys(path: Sequence[str], schema: type[Section]) -> list[str]:
    """Return the keys that a missing key stands for: those that a whole missing section must have."""
    section = schema.model_fields[path[0]].annotation if len(path) == 1 else None
    if path == ("method",):
        return ["method.name"]
    if not (isinstance(section, type) and issubclass(section, Section)):
        return [".".join(path)]
    return [f"{path[0]}.{name}" for name, field in section.model_fields.items() if field.is_required()]


def _mistake(error: Any, values: dict[str, Any], schema: type[Section], source: type[Section]) -> str:
    path = _path(error)
    where, message = ".".join(path), error["msg"]
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"], values, schema, source)
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
        return f"unknown key '{where}': {hint}"
    if error["type"] == "unknown_method":
        return f"method.name is {error['input'].get('name')!r}: {message}"
    if error["type"] == "inconsistent":
        return str(message)
    return f"'{where}' is {error['input']!r}: {message[0].lower()}{message[1:]}"


def _path(error: Any) -> list[str]:
    """Return the keys that lead to an error, without the union members that pydantic adds (int, constrained-int)."""
    if not error["loc"]:
        return []
    *above, last = error["loc"]
    kept = [part for part in above if _is_key(part)]
    kept += [last] if error["type"] == "extra_forbidden" or _is_key(last) else []
    return [str(p) for p in kept]


def _is_key(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("int", "float", "str", "bool"))


def _known_keys(
    location: Sequence[Any], values: Any, schema: type[Section], source: type[Section]
) -> list[str]:
    """Return the keys allowed where `location` points in a recipe of these values."""
    if location[:2] == ("data", "source"):
        return sorted(source.model_fields)
    model: Any = schema
    for part in location[:-1]:
        model = model.model_fields[part].annotation
        values = values[part]
        if model is MethodConfig:
            model = METHODS[values["name"]].config_class
    return sorted(model.model_fields)
