"""YAML and JSON in which no key stands twice: their parsers keep the last of two and say nothing."""

from __future__ import annotations

import json
import json.decoder
import json.scanner
from typing import Any

import yaml


class DuplicateKeyError(ValueError):
    """A key that stands twice in one mapping; `place` says where, where the text is known."""

    def __init__(self, key: object, place: str = "") -> None:
        super().__init__(f"the key {key!r} stands twice{place}")
        self.key = key


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise DuplicateKeyError(key.value, f" in one mapping, in lines {lines[name]} and {line}")
                lines[name] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        DuplicateKeyError: a mapping holds a key twice, with both lines.
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dict, for `object_pairs_hook`.

    Raises:
        DuplicateKeyError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(next(key for key in keys if keys.count(key) > 1), " in one object")
    return found


def parse_json(text: str) -> Any:
    """Return the value of a JSON document.

    Raises:
        DuplicateKeyError: an object holds a key twice, with the object's line.
        json.JSONDecodeError: it is no JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_pairs)
    except DuplicateKeyError:
        return _Locating().decode(text)


class _Locating(json.JSONDecoder):
    """The decoder of the standard library in Python, which knows where an object begins."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=unique_pairs)
        self.parse_object = self._parse_object
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    @staticmethod
    def _parse_object(s_and_end: tuple[str, int], *arguments: Any) -> Any:
        text, end = s_and_end
        try:
            return json.decoder.JSONObject(s_and_end, *arguments)  # type: ignore[attr-defined]
        except DuplicateKeyError as error:
            if "begins" in str(error):
                raise
            line = text.count("\n", 0, end) + 1
            raise DuplicateKeyError(error.key, f" in the object that begins in line {line}") from error
