"""The report's pictures: what the ranks did, where, and when."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

DPI = 176  # twice the pixels that the page shows an inch with, for sharp displays

_INK = "#1f2933"
_MUTED = "#6b7785"
_GRID = "#e4e8ec"
_BLUE = "#2166ac"
_RED = "#b2382f"
# Red: grown, white: as at the start, blue: shrunk; without the darkest ends, on which numbers are hard to read.
_DIVERGING = LinearSegmentedColormap.from_list("change", colormaps["RdBu_r"](np.linspace(0.07, 0.93, 255)))
_NOWHERE = -1  # the layer of a module outside the numbered layers

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
    return Place(int(match["layer"]), match["kind"], head) if match else Place(_NOWHERE, linear, head)


def _kinds(modules: Iterable[str]) -> list[str]:
    """Return the kinds of linears that occur, in the order of a transformer layer."""
    kinds = {place(module).kind for module in modules}
    return sorted(kinds, key=lambda kind: (_ORDER.index(_last(kind)) if _last(kind) in _ORDER else 99, kind))


def _labels(kinds: Sequence[str]) -> list[str]:
    """Return the kinds' last parts where these tell them apart."""
    short = [_last(kind) for kind in kinds]
    return short if len(set(short)) == len(short) else list(kinds)


def _last(kind: str) -> str:
    return kind.rsplit(".", 1)[-1]


def rank_heatmap(start: Mapping[str, int], end: Mapping[str, int]) -> Figure:
    """Draw the final rank (the number) and change since the start (the colour) of every module, kind by layer.

    Heads that have ranks of their own are rows below each other.
    """
    kinds, places = _kinds(end), {module: place(module) for module in end}
    rows = sorted({(kinds.index(p.kind), p.head) for p in places.values()})
    layers = sorted({p.layer for p in places.values()})
    ranks = np.full((len(rows), len(layers)), np.nan)
    changes = np.full_like(ranks, np.nan)
    for module, where in places.items():
        cell = rows.index((kinds.index(where.kind), where.head)), layers.index(where.layer)
        ranks[cell], changes[cell] = end[module], end[module] - start[module]
    figure, [axes] = _canvas(width=2.6 + 0.36 * max(len(layers), 16), height=1.7 + 0.4 * len(rows))
    image = _diverging(axes, changes)
    for row, column in np.argwhere(~np.isnan(ranks)):
        dark = abs(changes[row, column]) > 0.6 * _reach(changes)
        colour = "white" if dark else _INK
        axes.text(
            column, row, f"{ranks[row, column]:.0f}", ha="center", va="center", fontsize=8, color=colour
        )
    axes.set_xticks(range(len(layers)), ["none" if layer == _NOWHERE else str(layer) for layer in layers])
    names = _labels(kinds)
    axes.set_yticks(
        range(len(rows)), [names[kind] if head < 0 else f"{names[kind]} {head}" for kind, head in rows]
    )
    axes.set_xticks(np.arange(-0.5, len(layers)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("layer")
    _title(axes, f"Final rank of every module; colour: change from {_start(start)}")
    _change_bar(figure, axes, image)
    return figure


def rank_history(adjustments: Sequence[tuple[int, Mapping[str, int]]], start: Mapping[str, int]) -> Figure:
    """Change of every module's rank since the start: one row per adjustment, given as (step, ranks after it)."""
    kinds = _kinds(start)
    places = {module: place(module) for module in start}
    columns = sorted(start, key=lambda b: (kinds.index(places[b].kind), places[b].layer, places[b].head))
    changes = np.array(
        [[after[module] - start[module] for module in columns] for _, after in adjustments], float
    )
    figure, [axes] = _canvas(width=11, height=1.9 + 0.24 * min(max(len(adjustments), 6), 30))
    image = _diverging(axes, changes)
    groups = [sum(p.kind == kind for p in places.values()) for kind in kinds]
    ends = np.cumsum(groups)
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color=_INK, linewidth=0.7)
    axes.set_xticks(ends - np.array(groups) / 2 - 0.5, _labels(kinds))
    shown = np.unique(np.linspace(0, len(adjustments) - 1, min(len(adjustments), 20)).round().astype(int))
    axes.set_yticks(shown, [f"{adjustments[row][0]:,}" for row in shown])
    axes.tick_params(length=0)
    axes.set_ylabel("adjustment at step")
    axes.set_xlabel("modules, from the first to the last layer within each kind")
    _title(axes, f"Every module's change from {_start(start)}, adjustment by adjustment")
    _change_bar(figure, axes, image)
    return figure


def course(metrics: Sequence[Mapping[str, float]], adjustment_steps: Sequence[int]) -> Figure:
    """Draw loss and total rank over the steps, with the adjustments marked."""
    steps = np.array([line["step"] for line in metrics])
    figure, [top, bottom] = _canvas(width=11, height=5.0, rows=2)
    loss = np.array([line["loss"] for line in metrics], float)
    top.plot(steps, loss, color=_BLUE, alpha=0.3, linewidth=0.8, label="every step")
    top.plot(steps, _smoothed(loss), color=_BLUE, linewidth=1.8, label="smoothed")
    top.set_ylabel("training loss")
    stored = [line["total_rank_stored"] for line in metrics]
    live = [line["total_rank_live"] for line in metrics]
    if live == stored:
        bottom.plot(steps, stored, color=_RED, linewidth=1.8, label="live and stored")
    else:
        bottom.plot(steps, stored, color=_MUTED, linewidth=1.5, label="stored")
        bottom.plot(steps, live, color=_RED, linewidth=1.8, label="live")
    bottom.set_ylabel("total rank")
    bottom.set_xlabel("step")
    bottom.set_ylim(0, 1.15 * max(stored))
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for axes in (top, bottom):
        for step in adjustment_steps:
            axes.axvline(step, color=_GRID, linewidth=1.2, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    top.legend(frameon=False, fontsize=9, labelcolor=_INK, ncols=2, loc="upper right")
    bottom.legend(frameon=False, fontsize=9, labelcolor=_INK, ncols=2, loc="lower right")
    _title(top, "Loss and total rank" + ("; vertical lines: adjustments" if adjustment_steps else ""))
    return figure


def _canvas(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[2, 1][:rows])[:, 0])
    for one in axes:
        one.tick_params(labelsize=9, colors=_MUTED, labelcolor=_INK)
        one.xaxis.label.set(color=_INK, size=10)
        one.yaxis.label.set(color=_INK, size=10)
        one.spines[:].set_color(_GRID)
    return figure, axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=11.5, weight="bold", color=_INK, pad=9)


def _start(start: Mapping[str, int]) -> str:
    low, high = min(start.values()), max(start.values())
    return f"the initial rank {low}" if low == high else f"the initial ranks {low} to {high}"


def _diverging(axes: Axes, changes: np.ndarray) -> AxesImage:
    """Return an image whose white is no change, and whose red and blue reach equally far."""
    norm = TwoSlopeNorm(vcenter=0, vmin=-_reach(changes), vmax=_reach(changes))
    return axes.imshow(changes, cmap=_DIVERGING, norm=norm, aspect="auto", interpolation="nearest")


def _reach(changes: np.ndarray) -> float:
    return max(1.0, float(np.nanmax(np.abs(changes))))


def _change_bar(figure: Figure, axes: Axes, image: AxesImage) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03, aspect=15)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f}" if value else "0")
    bar.ax.tick_params(labelsize=9, length=0, labelcolor=_INK)
    bar.set_label("change of rank", size=9, color=_INK)
    bar.outline.set_visible(False)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of a twentieth of the values."""
    window = np.ones(max(1, len(values) // 20) | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
