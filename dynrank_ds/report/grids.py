"""Figures that are a grid of the model: a row per linear or head, a column per layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from dynrank_ds.report.canvas import DPI, INK, style
from dynrank_ds.report.places import NOWHERE, kinds_of, labels, place

_COLUMNS = 32
"""Layers of a panel at most: what a page of 1,200 pixels shows without scrolling."""
_CELL = (0.33, 0.4)
"""Width and height of a cell, in inches, that holds a number of three digits."""


def layer_grid(
    rows: Sequence[str], layers: Sequence[int], values: np.ndarray, colours: tuple[Colormap, Normalize]
) -> tuple[Figure, list[Axes], AxesImage]:
    """Draw values (rows, layers) as coloured cells; more than 32 layers fall into panels below each other.

    Cells that are nan stay empty.

    Returns:
        The figure, its panels from the first layers to the last, and an image for `colour_bar`.
    """
    starts = _panel_starts(len(layers))
    columns = starts[1] - starts[0]
    figure = Figure(
        figsize=(2.5 + _CELL[0] * max(columns, 16), 0.8 + (0.9 + _CELL[1] * len(rows)) * (len(starts) - 1)),
        dpi=DPI,
        layout="constrained",
        facecolor="white",
    )
    panels = list(figure.subplots(len(starts) - 1, 1, squeeze=False)[:, 0])
    for panel, start, stop in zip(panels, starts, starts[1:], strict=False):
        style(panel)
        shown = np.full((len(rows), columns), np.nan)  # as wide as the others, so that all cells are alike
        shown[:, : stop - start] = values[:, start:stop]
        cmap, norm = colours
        image = panel.imshow(shown, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
        panel.set_xticks(range(stop - start), layer_labels(layers[start:stop]))
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xticks(np.arange(-0.5, columns), minor=True)
        panel.set_yticks(np.arange(-0.5, len(rows)), minor=True)
        panel.grid(which="minor", color="white", linewidth=1.5)
        panel.tick_params(which="both", length=0)
    panels[-1].set_xlabel("layer")
    return figure, panels, image


def write_numbers(panels: Sequence[Axes], texts: np.ndarray, on_dark: np.ndarray) -> None:
    """Write texts (rows, layers) into the cells of `layer_grid`, white where `on_dark`; empty ones are left out."""
    starts = _panel_starts(texts.shape[1])
    for row, column in np.argwhere(texts != ""):
        number = int(np.searchsorted(starts, column, side="right")) - 1
        panels[number].text(
            column - starts[number],
            row,
            texts[row, column],
            ha="center",
            va="center",
            fontsize=8,
            color="white" if on_dark[row, column] else INK,
        )


def layer_labels(layers: Sequence[int]) -> list[str]:
    """Return the numbers of layers as text; `none` for what lies in no layer."""
    return ["none" if layer == NOWHERE else str(layer) for layer in layers]


def mark_kinds(axes: Axes, modules: Sequence[str], colour: str) -> None:
    """Label the columns of `in_model_order` modules by their kind, with a line of this colour between two kinds.

    Kinds too narrow for a label of their own share one with their neighbours, each in a line of it.
    """
    kinds = kinds_of(modules)
    of_module = [place(module).kind for module in modules]
    ends = np.cumsum([of_module.count(kind) for kind in kinds])
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color=colour, linewidth=0.7)
    ticks: list[tuple[list[str], int, int]] = []
    for label, start, end in zip(labels(kinds), [0, *ends[:-1]], ends, strict=True):
        narrow = end - start < 0.05 * len(modules)
        if narrow and ticks and ticks[-1][2] - ticks[-1][1] < 0.05 * len(modules):
            ticks[-1] = ([*ticks[-1][0], label], ticks[-1][1], end)
        else:
            ticks.append(([label], start, end))
    axes.set_xticks([(s + e) / 2 - 0.5 for _, s, e in ticks], ["\n".join(names) for names, _, _ in ticks])
    axes.tick_params(length=0)
    axes.set_xlabel("modules, from the first to the last layer within each kind")


def _panel_starts(columns: int) -> list[int]:
    """Return where each panel begins, and the end of the last one; all but the last are equally wide."""
    panels = -(-columns // _COLUMNS)
    width = -(-columns // panels)
    return [*range(0, columns, width), columns]
