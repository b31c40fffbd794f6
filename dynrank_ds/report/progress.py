"""Figures of training's progress: losses, learning rate, total rank, gradients and penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynrank_ds.report.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    RED,
    SERIES,
    Plot,
    canvas,
    legend,
    marker,
    open_axes,
    smoothed,
    title,
)
from dynrank_ds.report.record import RunRecord

_PENALTIES = {
    **dict.fromkeys(("pe_dyra", "adalora", "elalora", "increlora"), "orthogonality loss"),
    "dynamic_dora": "variance penalty (DEM)",
}
"""What each method's penalty is called."""


def course(metrics: Sequence[Mapping[str, Any]], adjustment_steps: Sequence[int]) -> Figure:
    """Draw losses, total rank and learning rate over the steps, with the adjustments marked."""
    steps = np.array([line["step"] for line in metrics])
    figure, [top, middle, bottom] = canvas(width=11, height=6.0, heights=(2, 1, 0.7))
    loss = np.array([line["loss"] for line in metrics], float)
    dot = marker(len(steps))
    top.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=0.8, marker=dot, label="every step")
    top.plot(steps, smoothed(loss), color=BLUE, linewidth=1.8, label="smoothed")
    held_out = [(line["step"], line["held_out_loss"]) for line in metrics if "held_out_loss" in line]
    if held_out:
        top.plot(
            *zip(*held_out, strict=True), color=GREEN, marker="o", markersize=3, linewidth=1, label="held out"
        )
    top.set_ylabel("loss")
    stored = [line["total_rank_stored"] for line in metrics]
    live = [line["total_rank_live"] for line in metrics]
    if live == stored:
        middle.plot(steps, stored, color=RED, linewidth=1.8, marker=dot, label="live and stored")
    else:
        middle.plot(steps, stored, color=MUTED, linewidth=1.5, label="stored")
        middle.plot(steps, live, color=RED, linewidth=1.8, label="live")
    middle.set_ylabel("total rank")
    middle.set_ylim(0, 1.15 * max(stored))
    middle.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    bottom.plot(steps, [line["learning_rate"] for line in metrics], color=INK, linewidth=1.4, marker=dot)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    open_axes((top, middle, bottom), adjustment_steps)
    legend(top, ncols=3, loc="upper right")
    legend(middle, loc="lower right")
    title(
        top,
        "Loss, total rank and learning rate" + ("; vertical lines: adjustments" if adjustment_steps else ""),
    )
    return figure


def gradients(metrics: Sequence[Mapping[str, Any]], adjustment_steps: Sequence[int], penalty: str) -> Figure:
    """Draw the gradient's norm by factor, and the penalty, called so, where the method has one."""
    steps = [line["step"] for line in metrics]
    penalties = [line.get("penalty") for line in metrics]
    has_penalty = any(value is not None for value in penalties)
    figure, axes = canvas(
        width=11, height=4.4 if has_penalty else 2.8, heights=(1.4, 1) if has_penalty else (1,)
    )
    factors = sorted({factor for line in metrics for factor in line.get("grad_norms", {})})
    for colour, factor in zip(SERIES, factors, strict=False):
        norms = [line.get("grad_norms", {}).get(factor, np.nan) for line in metrics]
        axes[0].plot(steps, norms, color=colour, linewidth=1.2, marker=marker(len(steps)), label=factor)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("gradient norm")
    legend(axes[0], ncols=3)
    if has_penalty:
        values = [np.nan if p is None else p for p in penalties]
        axes[1].plot(steps, values, color=INK, linewidth=1.4, marker=marker(len(steps)))
        axes[1].set_ylabel(penalty)
    axes[-1].set_xlabel("step")
    open_axes(axes, adjustment_steps)
    title(axes[0], "Gradient norm by factor" + (f" and {penalty}" if has_penalty else ""))
    return figure


def progress_plots(record: RunRecord) -> list[Plot]:
    """Return the figures of losses and gradients; none where no step was finished."""
    if not record.metrics:
        return []
    steps = [line["step"] for line in record.adjustments]
    keys = ("step", "loss", "held_out_loss", "learning_rate", "total_rank_live", "total_rank_stored")
    plots = [
        Plot(
            "course",
            course(record.metrics, steps),
            "Loss, total rank and learning rate over the steps",
            "The loss is the mean over a global batch's target tokens before its update, smoothed over a twentieth of "
            "the steps. Live rank leaves out masked triples.",
            keys,
            [tuple(line.get(key) for key in keys) for line in record.metrics],
        )
    ]
    if any(line.get("grad_norms") for line in record.metrics):
        factors = sorted({factor for line in record.metrics for factor in line.get("grad_norms", {})})
        plots.append(
            Plot(
                "gradients",
                gradients(record.metrics, steps, _PENALTIES.get(record.method, "penalty")),
                "Gradient norm by factor and penalty over the steps",
                "Norms over all modules before clipping. The penalty is what the method adds to the loss, its "
                "coefficient included: the orthogonality loss of PE-DyRA, AdaLoRA, ElaLoRA and IncreLoRA (compare "
                "PE-DyRA, Figs. 10 and 11), the variance of dynamic DoRA.",
                ("step", *factors, "penalty"),
                [
                    (line["step"], *(line.get("grad_norms", {}).get(f) for f in factors), line.get("penalty"))
                    for line in record.metrics
                ],
            )
        )
    return plots
