"""Figures of ranks: where they ended, and how every module came there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynrank_ds.report.canvas import (
    DPI,
    INK,
    ORDERED,
    Plot,
    canvas,
    colour_bar,
    diverging,
    open_axes,
    reach,
    start_text,
    style,
    title,
)
from dynrank_ds.report.places import NOWHERE, in_model_order, kinds_of, labels, place
from dynrank_ds.report.record import RunRecord


def rank_heatmap(start: Mapping[str, int], end: Mapping[str, int]) -> Figure:
    """Draw the final rank (the number) and change since the start (the colour) of every module, kind by layer.

    Heads that have ranks of their own are rows below each other.
    """
    kinds, places = kinds_of(end), {module: place(module) for module in end}
    rows = sorted({(kinds.index(p.kind), p.head) for p in places.values()})
    layers = sorted({p.layer for p in places.values()})
    ranks = np.full((len(rows), len(layers)), np.nan)
    changes = np.full_like(ranks, np.nan)
    for module, where in places.items():
        cell = rows.index((kinds.index(where.kind), where.head)), layers.index(where.layer)
        ranks[cell], changes[cell] = end[module], end[module] - start[module]
    figure, [axes] = canvas(width=2.6 + 0.36 * max(len(layers), 16), height=1.7 + 0.4 * len(rows))
    image = diverging(axes, changes)
    for row, column in np.argwhere(~np.isnan(ranks)):
        dark = abs(changes[row, column]) > 0.6 * reach(changes)
        colour = "white" if dark else INK
        axes.text(
            column, row, f"{ranks[row, column]:.0f}", ha="center", va="center", fontsize=8, color=colour
        )
    axes.set_xticks(range(len(layers)), ["none" if layer == NOWHERE else str(layer) for layer in layers])
    names = labels(kinds)
    axes.set_yticks(
        range(len(rows)), [names[kind] if head < 0 else f"{names[kind]} {head}" for kind, head in rows]
    )
    axes.set_xticks(np.arange(-0.5, len(layers)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("layer")
    title(axes, f"Final rank of every module; colour: change from {start_text(start.values())}")
    colour_bar(figure, axes, image, "change of rank", signed=True)
    return figure


def rank_history(adjustments: Sequence[tuple[int, Mapping[str, int]]], start: Mapping[str, int]) -> Figure:
    """Draw every module's change of rank since the start: a row per adjustment, given as (step, ranks after it)."""
    columns = in_model_order(start)
    kinds = kinds_of(start)
    changes = np.array(
        [[after[module] - start[module] for module in columns] for _, after in adjustments], float
    )
    figure, [axes] = canvas(width=11, height=1.9 + 0.24 * min(max(len(adjustments), 6), 30))
    image = diverging(axes, changes)
    groups = [sum(place(module).kind == kind for module in columns) for kind in kinds]
    ends = np.cumsum(groups)
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color=INK, linewidth=0.7)
    axes.set_xticks(ends - np.array(groups) / 2 - 0.5, labels(kinds))
    shown = np.unique(np.linspace(0, len(adjustments) - 1, min(len(adjustments), 20)).round().astype(int))
    axes.set_yticks(shown, [f"{adjustments[row][0]:,}" for row in shown])
    axes.tick_params(length=0)
    axes.set_ylabel("adjustment at step")
    axes.set_xlabel("modules, from the first to the last layer within each kind")
    title(axes, f"Every module's change from {start_text(start.values())}, adjustment by adjustment")
    colour_bar(figure, axes, image, "change of rank", signed=True)
    return figure


def rank_paths(record: RunRecord) -> Figure:
    """Draw the rank of every module over the steps: one panel per kind of linear, one line per layer."""
    kinds = kinds_of(record.start)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(11, 0.7 + 1.9 * rows), dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    steps = [
        0,
        *(line["step"] for line in record.adjustments),
        record.metrics[-1]["step"] if record.metrics else 0,
    ]
    layers = [place(module).layer for module in record.start]
    span = max(1, max(layers) - min(layers))
    for panel, kind, label in zip(panels, kinds, labels(kinds), strict=False):
        style(panel)
        for module in (m for m in record.start if place(m).kind == kind):
            path = [
                record.start[module],
                *(line["after"][module] for line in record.adjustments),
                record.end[module],
            ]
            colour = ORDERED(0.92 * (place(module).layer - min(layers)) / span)
            panel.step(steps, path, where="post", color=colour, linewidth=1, alpha=0.8)
        panel.set_title(label, loc="left", size=10, color=INK)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    open_axes(panels)
    figure.supxlabel("step", size=10, color=INK)
    figure.supylabel("rank", size=10, color=INK)
    figure.suptitle(
        f"Rank of every module over the steps; dark: layer {min(layers)}, light: layer {max(layers)}",
        x=0.01,
        ha="left",
        size=11.5,
        weight="bold",
        color=INK,
    )
    return figure


def rank_plots(record: RunRecord) -> list[Plot]:
    """Return the figures of ranks; of a run without adjustments the final ranks alone."""
    if not record.end:
        return []
    plots = [
        Plot(
            "ranks",
            rank_heatmap(record.start, record.end),
            "Final rank of every module by kind and layer",
            "The number is the rank that the module ends with, the colour its change since the start of the run.",
            ("module", "rank at the start", "rank at the end"),
            [(module, record.start[module], record.end[module]) for module in record.end],
        )
    ]
    if record.adjustments:
        history = [(line["step"], line["after"]) for line in record.adjustments]
        rows = [(step, module, rank) for step, ranks in history for module, rank in ranks.items()]
        columns = ("step of the adjustment", "module", "rank after it")
        plots += [
            Plot(
                "history",
                rank_history(history, record.start),
                "Change of every module's rank at each adjustment",
                "A row is the state after an adjustment; a column is a module.",
                columns,
                rows,
            ),
            Plot(
                "paths",
                rank_paths(record),
                "Rank of every module over the steps, by kind of linear",
                "Stored ranks, masked triples included; compare PE-DyRA, Fig. 3.",
                columns,
                rows,
            ),
        ]
    return plots
