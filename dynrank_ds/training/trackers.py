"""Experiment trackers: TensorBoard and Weights & Biases, written by the first process of a run."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dynrank_ds.errors import MachineError
from dynrank_ds.files import replace_text
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.rundir import RunDirectory

if TYPE_CHECKING:  # matplotlib takes a second to load, which runs without trackers are spared
    from matplotlib.figure import Figure

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""By name in `output.report_to`."""

_OF_A_STEP = (
    "loss",
    "held_out_loss",
    "learning_rate",
    "grad_norm",
    "penalty",
    "tokens_per_second",
    "memory_gib",
    "seconds",
    "total_rank_live",
    "total_rank_stored",
    "trainable_parameters",
)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Tracker(Protocol):
    """Where a run is followed; steps ascend."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_figure(self, step: int, name: str, figure: Figure) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run directory's `tensorboard`; `first_step` and later ones of an earlier file are void."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self._writer.add_text("recipe", f"```yaml\n{recipe.dump()}```", first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_figure(self, step: int, name: str, figure: Figure) -> None:
        self._writer.add_figure(name, figure, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose id the run directory keeps; its variables, as WANDB_MODE, are respected."""

    def __init__(self, run: Path, recipe: Recipe, first_step: int) -> None:
        import wandb

        path = run / "wandb_id"
        if first_step == 1 or not path.is_file():
            replace_text(path, uuid.uuid4().hex)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dynrank_ds"),
            name=run.resolve().name,
            id=path.read_text(),
            resume="allow",
            dir=str(run),
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_figure(self, step: int, name: str, figure: Figure) -> None:
        self._run.log({name: self._wandb.Image(figure)}, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """All trackers of a run, and what they are given of a step and an adjustment."""

    def __init__(self, trackers: Sequence[Tracker] = (), start: Mapping[str, int] | None = None) -> None:
        self._trackers = trackers
        self._start = start
        """The rank of every module when the run began; None where ranks were never adjusted."""

    @classmethod
    def open(cls, directory: RunDirectory, recipe: Recipe, first_step: int) -> Trackers:
        """Open those of `output.report_to`, which continue at `first_step`; the first process alone calls it."""
        history = directory.adjustments()
        trackers = [_TRACKERS[name](directory.path, recipe, first_step) for name in recipe.output.report_to]
        return cls(trackers, history[0]["before"] if history else None)

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl; steps whose batch was discarded are left out."""
        if self._trackers and not values["discarded"]:
            known = {name: values[name] for name in _OF_A_STEP if values.get(name) is not None}
            known |= {f"grad_norm/{factor}": norm for factor, norm in values["grad_norms"].items()}
            self._log(values["step"], known)

    def log_adjustment(self, values: Mapping[str, Any]) -> None:
        """Log a line of ranks.jsonl: mean ranks by kind, quantiles of the scores, and the map of the ranks."""
        if not self._trackers:
            return
        import numpy as np

        from dynrank_ds.report.places import place
        from dynrank_ds.report.ranks import rank_heatmap

        self._start = self._start or values["before"]
        after: Mapping[str, int] = values["after"]
        by_kind: dict[str, list[int]] = {}
        for module, rank in after.items():
            by_kind.setdefault(place(module).kind, []).append(rank)
        known = {f"mean_rank/{kind}": float(np.mean(ranks)) for kind, ranks in by_kind.items()}
        known["mean_rank/all"] = float(np.mean(list(after.values())))
        scores = np.concatenate([np.asarray(each, float) for each in values["scores"].values()])
        known |= {f"score/quantile_{q}": float(np.quantile(scores, q)) for q in _QUANTILES}
        known["adjustment_seconds"] = values["seconds"]
        self._log(values["step"], known)
        for tracker in self._trackers:
            tracker.log_figure(values["step"], "ranks", rank_heatmap(self._start, after))

    def close(self) -> None:
        """Write what is left."""
        for tracker in self._trackers:
            tracker.close()

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)


def check_packages(recipe: Recipe) -> None:
    """Refuse trackers that are not installed.

    Raises:
        MachineError: naming the package.
    """
    for name in recipe.output.report_to:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise MachineError(
                f"output.report_to names {name}, which is not installed: pip install {PACKAGES[name]}"
            )
