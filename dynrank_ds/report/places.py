"""Where a module is in the model: its layer, its kind of linear, its head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

NOWHERE = -1
"""The layer of a module outside the numbered layers."""

_LAYER = re.compile(r"(?:^|.*?\.)(?P<layer>\d+)\.(?P<kind>.+)")
_HEAD = re.compile(r"(?P<linear>.+)\.blocks\.(?P<head>\d+)")
# The order of a transformer layer's linears; other modules follow in the order of their names.
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Place:
    """The place of a module in the model.

    Its layer (-1 outside of layers), its linear's kind, e.g. `self_attn.q_proj`, and which of its heads it is (-1 where
    it is the whole linear).
    """

    layer: int
    kind: str
    head: int = -1


def place(module: str) -> Place:
    """Return layer 3 and kind self_attn.q_proj of `model.layers.3.self_attn.q_proj`; head 2 if `.blocks.2` follows."""
    of_head = _HEAD.fullmatch(module)
    linear, head = (of_head["linear"], int(of_head["head"])) if of_head else (module, -1)
    match = _LAYER.fullmatch(linear)
    return Place(int(match["layer"]), match["kind"], head) if match else Place(NOWHERE, linear, head)


def linear_of(module: str) -> str:
    """Return the name of the linear that a module is, or is a head of."""
    of_head = _HEAD.fullmatch(module)
    return of_head["linear"] if of_head else module


def by_linear(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the rank of every linear: of one whose heads have ranks of their own, their sum."""
    summed: dict[str, int] = {}
    for module, rank in ranks.items():
        summed[linear_of(module)] = summed.get(linear_of(module), 0) + rank
    return summed


def kinds_of(modules: Iterable[str]) -> list[str]:
    """Return the kinds of linears that occur, in the order of a transformer layer."""
    kinds = {place(module).kind for module in modules}
    return sorted(kinds, key=lambda kind: (_ORDER.index(_last(kind)) if _last(kind) in _ORDER else 99, kind))


def labels(kinds: Sequence[str]) -> list[str]:
    """Return the kinds' last parts where these tell them apart."""
    short = [_last(kind) for kind in kinds]
    return short if len(set(short)) == len(short) else list(kinds)


def in_model_order(modules: Iterable[str]) -> list[str]:
    """Return the modules sorted by kind, then layer, then head."""
    names = list(modules)
    kinds, places = kinds_of(names), {name: place(name) for name in names}
    return sorted(names, key=lambda n: (kinds.index(places[n].kind), places[n].layer, places[n].head))


def _last(kind: str) -> str:
    return kind.rsplit(".", 1)[-1]
