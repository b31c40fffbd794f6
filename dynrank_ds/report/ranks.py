"""Figures of ranks: where they ended, and how every module came there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynrank_ds.report.canvas import (
    DPI,
    INK,
    LINES,
    ORDERED,
    Plot,
    canvas,
    colour_bar,
    diverging,
    open_axes,
    reach,
    start_text,
    strip,
    style,
    title,
)
from dynrank_ds.report.grids import layer_grid, layer_labels, mark_kinds, write_numbers
from dynrank_ds.report.places import by_linear, in_model_order, kinds_of, labels, place
from dynrank_ds.report.record import RunRecord


def rank_heatmap(start: Mapping[str, int], end: Mapping[str, int]) -> Figure:
    """Draw the final rank (the number) and change since the start (the colour) of every linear, kind by layer.

    Of linears whose heads have ranks of their own these are the sums.
    """
    start, end = by_linear(start), by_linear(end)
    kinds, places = kinds_of(end), {linear: place(linear) for linear in end}
    layers = sorted({p.layer for p in places.values()})
    changes = np.full((len(kinds), len(layers)), np.nan)
    numbers = np.full(changes.shape, "", dtype=object)
    for linear, where in places.items():
        cell = kinds.index(where.kind), layers.index(where.layer)
        changes[cell], numbers[cell] = end[linear] - start[linear], str(end[linear])
    figure, panels, image = layer_grid(labels(kinds), layers, changes, diverging(changes))
    write_numbers(panels, numbers, np.abs(changes) > 0.6 * reach(changes))
    title(panels[0], f"Final rank of every linear; colour: change from {start_text(start.values())}")
    colour_bar(figure, panels, image, "change of rank", signed=True)
    return figure


def head_maps(end: Mapping[str, int]) -> Figure:
    """Draw the final rank of every head as a colour: a panel per kind of linear, heads by layers."""
    places = {module: place(module) for module in end}
    heads = {module: where for module, where in places.items() if where.head >= 0}
    kinds, layers = kinds_of(heads), sorted({where.layer for where in heads.values()})
    counts = [1 + max(where.head for where in heads.values() if where.kind == kind) for kind in kinds]
    cell = 0.24 if sum(counts) <= 40 else 0.11
    figure = Figure(
        figsize=(11, 1.0 + sum(0.55 + cell * count for count in counts)),
        dpi=DPI,
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    norm = Normalize(min(end[module] for module in heads), max(end[module] for module in heads))
    for panel, kind, label, count in zip(panels, kinds, labels(kinds), counts, strict=True):
        style(panel)
        ranks = np.full((count, len(layers)), np.nan)
        for module, where in heads.items():
            if where.kind == kind:
                ranks[where.head, layers.index(where.layer)] = end[module]
        image = panel.imshow(ranks, cmap=ORDERED, norm=norm, aspect="auto", interpolation="nearest")
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=max(1, min(8, count - 1))))
        panel.set_ylabel("head")
        panel.set_title(label, loc="left", size=10, color=INK)
        panel.tick_params(length=0)
    shown = np.arange(0, len(layers), -(-len(layers) // 40))
    panels[-1].set_xticks(shown, layer_labels([layers[number] for number in shown]))
    panels[-1].set_xlabel("layer")
    figure.suptitle("Final rank of every head", x=0.01, ha="left", size=11.5, weight="bold", color=INK)
    bar = colour_bar(figure, list(panels), image, "rank")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure


def rank_history(adjustments: Sequence[tuple[int, Mapping[str, int]]], start: Mapping[str, int]) -> Figure:
    """Draw every module's change of rank since the start: a row per adjustment, given as (step, ranks after it)."""
    columns = in_model_order(start)
    changes = np.array(
        [[after[module] - start[module] for module in columns] for _, after in adjustments], float
    )
    figure, [axes] = canvas(width=11, height=1.9 + 0.24 * min(max(len(adjustments), 6), 30))
    image = strip(axes, changes, diverging(changes))
    mark_kinds(axes, columns, INK)
    shown = np.unique(np.linspace(0, len(adjustments) - 1, min(len(adjustments), 20)).round().astype(int))
    axes.set_yticks(shown, [f"{adjustments[row][0]:,}" for row in shown])
    axes.set_ylabel("adjustment at step")
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
    norm = Normalize(min(layers), max(min(layers) + 1, max(layers)))
    for panel, kind, label in zip(panels, kinds, labels(kinds), strict=False):
        style(panel)
        for module in (m for m in record.start if place(m).kind == kind):
            path = [
                record.start[module],
                *(line["after"][module] for line in record.adjustments),
                record.end[module],
            ]
            colour = LINES(norm(place(module).layer))
            # Thousands of heads as an image, also in the SVG, which would have megabytes of lines.
            panel.step(
                steps, path, where="post", color=colour, linewidth=1, alpha=0.8, rasterized=len(layers) > 1000
            )
        panel.set_title(label, loc="left", size=10, color=INK)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    open_axes(panels)
    figure.supxlabel("step", size=10, color=INK)
    figure.supylabel("rank", size=10, color=INK)
    if max(layers) > min(layers):
        colour_bar(figure, list(panels), ScalarMappable(norm, LINES), "layer")
    figure.suptitle(
        "Rank of every module over the steps, by kind of linear",
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
            "Final rank of every linear by kind and layer",
            "The number is the rank that the linear ends with, the colour its change since the start of the run. Of a "
            "linear whose heads have ranks of their own both are sums over its heads; the data has every head.",
            ("module", "rank at the start", "rank at the end"),
            [(module, record.start[module], record.end[module]) for module in record.end],
        )
    ]
    heads = [module for module in record.end if place(module).head >= 0]
    if heads:
        plots.append(
            Plot(
                "heads",
                head_maps(record.end),
                "Final rank of every attention head by kind and layer",
                "Of q, k and v a head is a group of output rows, of o of input columns; k and v have as many as the "
                "model has key-value heads. Stored ranks, spare slots included. Compare ARD-LoRA, whose ranks are "
                "per layer and head.",
                ("kind of linear", "layer", "head", "rank at the start", "rank at the end"),
                [
                    (place(m).kind, place(m).layer, place(m).head, record.start[m], record.end[m])
                    for m in heads
                ],
            )
        )
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
