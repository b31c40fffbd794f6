"""A run that adjusts its ranks again and again, and what each adjustment takes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dynrank_ds.bench.collectives import Collectives
from dynrank_ds.bench.memory import resident_memory
from dynrank_ds.bench.sides import AfterStep
from dynrank_ds.recipe import Recipe


@dataclass(frozen=True)
class Adjustment:
    """What one adjustment took on one process."""

    seconds: dict[str, float]
    """`scores`; `resize`, the engine's rebuild with the migration of rows; `rest`: plan, check, log."""
    collectives: dict[str, int]
    """Ours and DeepSpeed's, by the name of the process group's method."""
    received: int
    """Bytes of the tensors that the collectives write to."""
    changed: int
    """Modules that lost or got a triple."""
    resident: int
    """Bytes of the process after it."""
    hooks: int
    """Of all modules of the model after it."""


@dataclass(frozen=True)
class Adjusting:
    """A contender of which every step is a training step with an adjustment; process R notes it in `notes`/R.jsonl."""

    name: str
    recipe: Recipe
    notes: Path

    def train(self, rank: int, world_size: int, after_step: AfterStep) -> None:
        """Train as described in Contender."""
        from dynrank_ds.bench.step import Timing
        from dynrank_ds.training.run import set_up
        from dynrank_ds.zero import processes

        device = processes.start(self.recipe.deepspeed.timeout)
        trainer = set_up(self.recipe, False, device)
        timing = Timing(trainer)
        with ExitStack() as up, (self.notes / f"{rank}.jsonl").open("w") as out:
            watch = _Watch(trainer, up.enter_context(Collectives().counting()))
            wanted = True
            while wanted:
                before = trainer.engine.layout.ranks
                timing.seconds([(timing.adjusting[0], True)])
                out.write(json.dumps(asdict(watch.adjustment(before))) + "\n")
                out.flush()
                wanted = after_step(0.0)


def read_adjustments(notes: Path) -> list[list[Adjustment]]:
    """Return the adjustments of every process."""
    return [
        [Adjustment(**json.loads(line)) for line in path.read_text().splitlines()]
        for path in sorted(notes.glob("[0-9].jsonl"))
    ]


class _Mark(NamedTuple):
    seconds: float
    collectives: Counter[str]
    received: int


class _Watch:
    """Notes time and collectives where the parts of an adjustment begin and end."""

    def __init__(self, trainer: Any, collectives: Collectives) -> None:
        self._engine, self._collectives = trainer.engine, collectives
        self._spans: dict[str, tuple[_Mark, _Mark]] = {}
        self._plan: Any = None
        # `plan` is the first thing that the trainer calls once it has the scores, `applied` the last.
        for owner, names in ((trainer.method, ("scores", "plan", "applied")), (trainer.engine, ("resize",))):
            vars(owner).update({name: self._noted(name, getattr(owner, name)) for name in names})

    def adjustment(self, before: Sequence[int]) -> Adjustment:
        """Return what the last adjustment took, from the ranks `before`."""
        scored, resized = self._spans["scores"], self._spans.pop("resize", None)
        applied = self._spans["plan"][0], self._spans["applied"][1]
        spans = [scored, applied]
        seconds = {
            "scores": _seconds(scored),
            "resize": _seconds(resized) if resized else 0.0,
        }
        seconds["rest"] = sum(map(_seconds, spans)) - sum(seconds.values())
        return Adjustment(
            seconds,
            dict(sum((end.collectives - begin.collectives for begin, end in spans), Counter())),
            sum(end.received - begin.received for begin, end in spans),
            len(self._plan.changed(before)),
            resident_memory(),
            self._engine.hooks(),
        )

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            began = self._mark()
            result = call(*arguments)
            self._spans[name] = began, self._mark()
            if name == "plan":
                self._plan = result
            return result

        return noted

    def _mark(self) -> _Mark:
        return _Mark(time.perf_counter(), self._collectives.calls.copy(), self._collectives.bytes)


def _seconds(span: tuple[_Mark, _Mark]) -> float:
    return span[1].seconds - span[0].seconds
