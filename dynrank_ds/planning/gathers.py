"""Which whole parameters a process holds when, under ZeRO-3: DeepSpeed's rules, followed for one micro-batch.

The rules are those of DeepSpeed 0.19.8's partitioned_param_coordinator.py once it has recorded a whole step: a module's
parameters are gathered when it is called, the next ones up to `stage3_prefetch_bucket_size` elements with them, and
they are released after it unless they are used again within `stage3_max_reuse_distance` elements. Several parameters
arrive in one buffer and are copied out of it, so that they exist twice for a moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynrank_ds.planning.architecture import Unit

Name = tuple[str, int]
"""Unit and number of a parameter in it."""


@dataclass(frozen=True)
class GatherLimits:
    """The keys of a ZeRO-3 configuration that decide what is gathered ahead and kept; elements."""

    prefetch: int = 50_000_000
    reuse_distance: int = 1_000_000_000
    live: int = 1_000_000_000

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> GatherLimits:
        """Return those of `zero_optimization`, with DeepSpeed's defaults."""
        return cls(
            int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            int(zero.get("stage3_max_reuse_distance", cls.reuse_distance)),
            int(zero.get("stage3_max_live_parameters", cls.live)),
        )


@dataclass(frozen=True)
class Moment:
    """A unit's turn in forward or backward; elements of whole parameters and buffers held."""

    unit: int
    backward: bool
    arriving: int
    """While its parameters are copied out of the buffers that they arrived in."""
    held: int
    """While it computes."""
    parameters: int
    """Of `held` what are parameters, present or on their way, and no buffers that were copied."""
    on_their_way: int
    """Of `held` the buffers that are being filled."""


@dataclass(frozen=True)
class _Turn:
    """An entry of the order in which modules are called; each lets the next parameters be gathered."""

    unit: int | None
    """None: a module that has no parameters of its own, such as the whole model."""
    backward: bool = False
    releases: bool = True


def _turns(units: Sequence[Unit], recomputed: bool) -> list[_Turn]:
    """Return the modules of the loss, model, decoder and rotary embedding, and the units, as they are called."""
    norm, without = len(units) - 2, _Turn(None)
    turns = [without, without, without, _Turn(0), without, *(_Turn(u) for u in range(1, len(units)))]
    back = _Turn(None, backward=True)
    # The head has no turn in backward: its gradient is computed in its forward.
    turns += [back, back, _Turn(norm, True)]
    for layer in range(norm - 1, 0, -1):
        # A layer that is recomputed is called once more within its backward, and released after both.
        turns += [_Turn(layer, True, releases=not recomputed)] + [_Turn(layer, True)] * recomputed
    return [*turns, _Turn(0, True)]


@dataclass
class _Buffer:
    """Parameters that arrive together, and their buffer until all of them were waited for."""

    waiting: set[Name]
    elements: int
    copied: bool = False


class _Coordinator:
    """The state of one process; `size` is the elements of every parameter."""

    def __init__(self, units: Sequence[Unit], tied: bool, recomputed: bool, limits: GatherLimits) -> None:
        self.units, self.limits = units, limits
        names = [[(unit.name, i) for i in range(len(unit.parameters))] for unit in units]
        self.size = {
            name: n
            for of_unit, unit in zip(names, units, strict=True)
            for name, n in zip(of_unit, unit.parameters, strict=True)
        }
        if tied:
            names[-1] = names[0]
        self.names = names
        self.turns = _turns(units, recomputed)
        self.queue = deque((name, step) for step, turn in enumerate(self.turns) for name in self.of(turn))
        self.claimed = dict.fromkeys(self.size, -1)
        """The last turn for which a parameter was gathered, or was found present when the next were gathered."""
        self.present: set[Name] = set()
        self.buffers: dict[Name, _Buffer] = {}
        self.gathered = 0

    def of(self, turn: _Turn) -> list[Name]:
        """Return the parameters that are gathered for a turn."""
        return [] if turn.unit is None else self.names[turn.unit]

    def held(self) -> int:
        """Elements of whole parameters and of buffers."""
        buffers = {id(b): b.elements for b in self.buffers.values()}
        return sum(self.size[name] for name in self.present) + sum(buffers.values())

    def parameters(self) -> int:
        """Elements of parameters that are present or on their way."""
        return sum(self.size[name] for name in {*self.present, *self.buffers})

    def on_their_way(self) -> int:
        """Return the elements of buffers that are waited for."""
        filling = (b for b in self.buffers.values() if not b.copied or len(b.waiting) == 1)
        return sum({id(b): b.elements for b in filling}.values())

    def gather(self, wanted: Sequence[Name]) -> None:
        missing = [name for name in wanted if name not in self.present and name not in self.buffers]
        if missing:
            buffer = _Buffer(set(missing), sum(self.size[name] for name in missing), len(missing) == 1)
            self.buffers |= dict.fromkeys(missing, buffer)
            self.gathered += buffer.elements

    def wait(self, wanted: Sequence[Name]) -> int:
        """Make parameters present; return what is held at most meanwhile."""
        arriving = self.held()
        for name in wanted:
            if name not in self.buffers:
                continue
            buffer = self.buffers.pop(name)
            if buffer.copied and len(buffer.waiting) == 1:  # a single parameter stays in its buffer
                self.present.add(name)
            elif not buffer.copied:
                self.present |= buffer.waiting
                buffer.copied = True
                self.buffers[name] = buffer
                arriving = max(arriving, self.held())
                del self.buffers[name]
            arriving = max(arriving, self.held())
        return arriving

    def prefetch(self, step: int, current: Sequence[Name]) -> None:
        seen: set[Name] = set()
        fresh = {name for name in current if self.claimed[name] < step}
        while self.queue and len(seen) < len(fresh):
            name, turn = self.queue.popleft()
            self.claimed[name] = turn
            seen.add(name)
        room = min(self.limits.live - self.parameters(), self.limits.prefetch)
        ahead: list[Name] = []
        elements = 0
        while self.queue and elements < room:
            name, turn = self.queue.popleft()
            if name not in self.present and name not in self.buffers and name not in ahead:
                ahead.append(name)
                elements += self.size[name]
            self.claimed[name] = max(self.claimed[name], turn)
        self.gather(ahead)

    def release(self, step: int) -> None:
        turn = self.turns[step]
        if turn.unit is None or not turn.releases:
            return
        is_layer = self.units[turn.unit].whole_layer
        leaving = {name for name in self.of(turn) if self.claimed[name] <= step + 1}
        passed = 0
        for later in self.turns[step + 1 :]:
            if passed >= self.limits.reuse_distance:
                break
            if later.unit is None and later.backward and is_layer:
                return  # backward begins with the whole model, which has all parameters
            if later.unit is not None and (is_layer or not self.units[later.unit].whole_layer):
                leaving -= set(self.names[later.unit])
                passed += sum(self.size[name] for name in self.names[later.unit])
        self.present -= leaving


def follow(
    units: Sequence[Unit], tied: bool, recomputed: bool, limits: GatherLimits
) -> tuple[list[Moment], int]:
    """Return the units' turns in a micro-batch's forward and backward, and the elements that are gathered in it.

    Args:
        units: in the order of the forward; the last has the parameters of the first where they are `tied`.
        tied: whether that is so.
        recomputed: whether backward calls each layer once more.
        limits: of the configuration.
    """
    state = _Coordinator(units, tied, recomputed, limits)
    moments = []
    for step, turn in enumerate(state.turns):
        wanted = state.of(turn)
        state.gather(wanted)
        arriving = state.wait(wanted)
        state.prefetch(step, wanted)
        if turn.unit is not None:
            moments.append(
                Moment(
                    turn.unit,
                    turn.backward,
                    arriving,
                    state.held(),
                    state.parameters(),
                    state.on_their_way(),
                )
            )
        state.release(step)
    return moments, state.gathered
