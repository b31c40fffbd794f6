"""What all figures of the report share: a figure with its caption and data, its axes, colours and text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

DPI = 176  # twice the pixels that the page shows an inch with, for sharp displays

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
BLUE, RED, GREEN = "#2166ac", "#b2382f", "#2a7d4f"
SERIES = (BLUE, RED, GREEN, "#8a5a00", "#6b3fa0", "#4d4d4d")
ORDERED = colormaps["viridis"]
"""For ordered data: its lightness grows evenly, also for colour-blind readers and in print."""
LINES = LinearSegmentedColormap.from_list("lines", ORDERED(np.linspace(0, 0.92, 256)))
"""The same for lines on white, without the yellow end."""
# Red: grown, white: as at the start, blue: shrunk; without the darkest ends, on which numbers are hard to read.
_DIVERGING = LinearSegmentedColormap.from_list("change", colormaps["RdBu_r"](np.linspace(0.07, 0.93, 255)))


@dataclass(frozen=True)
class Plot:
    """A figure of the page, with the data that it shows."""

    name: str
    """Of its files, NAME.png, NAME.svg and NAME.csv."""
    figure: Figure
    alt: str
    """What the picture shows, for who cannot see it."""
    caption: str
    """Definition, unit and source."""
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def canvas(width: float, height: float, heights: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """Return a figure in inches, and its axes below each other, with these relative heights and one x axis."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
    axes = list(grid[:, 0])
    for one in axes:
        style(one)
    return figure, axes


def style(axes: Axes) -> None:
    """Set the colours and sizes of ticks, labels and spines."""
    axes.tick_params(labelsize=9, colors=MUTED, labelcolor=INK)
    axes.xaxis.label.set(color=INK, size=10)
    axes.yaxis.label.set(color=INK, size=10)
    axes.spines[:].set_color(GRID)


def title(axes: Axes, text: str) -> None:
    """Write the title over the axes, on the left."""
    axes.set_title(text, loc="left", size=11.5, weight="bold", color=INK, pad=9)


def open_axes(axes: Iterable[Axes], adjustment_steps: Iterable[int] = ()) -> None:
    """Remove the upper and right spines, and mark adjustments by vertical lines."""
    steps = list(adjustment_steps)
    for one in axes:
        for step in steps:
            one.axvline(step, color=GRID, linewidth=1.2, zorder=0)
        one.spines[["top", "right"]].set_visible(False)
        one.margins(x=0.01)


def legend(axes: Axes, **options: Any) -> None:
    """Draw a legend without a frame."""
    axes.legend(**{"frameon": False, "fontsize": 9, "labelcolor": INK, "ncols": 2} | options)


def start_text(start: Iterable[int]) -> str:
    """Return `the initial rank 4`, or `the initial ranks 1 to 6`."""
    ranks = list(start)
    low, high = min(ranks), max(ranks)
    return f"the initial rank {low}" if low == high else f"the initial ranks {low} to {high}"


def diverging(changes: np.ndarray) -> tuple[Colormap, Normalize]:
    """Return colours whose white is no change, and whose red and blue reach equally far."""
    return _DIVERGING, TwoSlopeNorm(vcenter=0, vmin=-reach(changes), vmax=reach(changes))


def strip(axes: Axes, values: np.ndarray, colours: tuple[Colormap, Normalize]) -> AxesImage:
    """Draw values (rows, columns) as an image as wide as the axes; several columns of one pixel are averaged."""
    cmap, norm = colours
    averaged = values.shape[1] > 800
    return axes.imshow(
        values,
        cmap=cmap,
        norm=norm,
        aspect="auto",
        interpolation="antialiased" if averaged else "nearest",
        interpolation_stage="data",
    )


def marker(points: int) -> str:
    """Return the marker of a line: one where the points are too few for a line to be seen, else none."""
    return "o" if points < 3 else ""


def reach(changes: np.ndarray) -> float:
    """Return the largest absolute change, at least 1."""
    return max(1.0, float(np.nanmax(np.abs(changes))))


def colour_bar(
    figure: Figure, axes: Axes | Sequence[Axes], image: ScalarMappable, label: str, signed: bool = False
) -> Colorbar:
    """Draw the scale of an image's colours beside it."""
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03, aspect=15)
    if signed:
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f}" if value else "0")
    bar.ax.tick_params(labelsize=9, length=0, labelcolor=INK)
    bar.set_label(label, size=9, color=INK)
    bar.outline.set_visible(False)
    return bar


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of a twentieth of the values."""
    window = np.ones(max(1, len(values) // 20) | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
