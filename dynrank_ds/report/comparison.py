"""Several runs beside each other: their losses, and a table of what they cost and reached."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from dynrank_ds.report.canvas import SERIES, Plot, canvas, legend, marker, open_axes, smoothed, title
from dynrank_ds.report.record import RunRecord

TABLE_NOTE = (
    "Compare PE-DyRA, Table 10. Training time is the sum of all steps, adjustments included; in brackets each cost as "
    "a share of the first run's. Peak memory is that of the first process: its GPU's, on a CPU its resident memory."
)


def comparison_plot(records: Sequence[RunRecord]) -> Plot:
    """Return the smoothed training losses of runs, and their held-out losses as points."""
    figure, [axes] = canvas(width=11, height=3.6)
    rows: list[tuple[object, ...]] = []
    for number, record in enumerate(records):
        colour, dash = SERIES[number % len(SERIES)], "-" if number < len(SERIES) else "--"
        steps = [line["step"] for line in record.metrics]
        loss = smoothed(np.array([line["loss"] for line in record.metrics], float)) if steps else np.zeros(0)
        label = f"{record.name} ({record.method})"
        axes.plot(steps, loss, dash, color=colour, linewidth=1.6, marker=marker(len(steps)), label=label)
        held_out = [
            (line["step"], line["held_out_loss"]) for line in record.metrics if "held_out_loss" in line
        ]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=colour, markersize=4)
        found = dict(held_out)
        rows += [
            (record.name, step, value, found.get(step))
            for step, value in zip(steps, loss.tolist(), strict=True)
        ]
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, smoothed")
    open_axes([axes])
    legend(axes, ncols=1)
    title(axes, "Loss of the compared runs; points: held-out loss")
    return Plot(
        "comparison",
        figure,
        "Training loss of the compared runs over the steps",
        "Smoothed over a twentieth of each run's steps.",
        ("run", "step", "smoothed training loss", "held-out loss"),
        rows,
    )


def comparison_table(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the head and rows of the table; a run without a value has a dash (compare PE-DyRA, Table 10)."""
    tasks = sorted({task for record in records for task in record.scores})
    head = [
        "run",
        "method",
        "steps",
        "last loss",
        "last held-out loss",
        "parameters at the end",
        "seconds a step, median",
        "training time",
        "peak memory",
        *tasks,
    ]
    return head, [_row(record, records[0], tasks) for record in records]


def _row(record: RunRecord, first: RunRecord, tasks: Sequence[str]) -> list[str]:
    scores = [_score(record.scores[task]) if task in record.scores else "-" for task in tasks]
    if not record.metrics:
        return [record.name, record.method, "0", *["-"] * 6, *scores]
    last = record.metrics[-1]
    held_out = [line["held_out_loss"] for line in record.metrics if "held_out_loss" in line]
    costs = _costs(record)
    texts: tuple[str, ...] = (
        f"{costs[0]:,.0f}",
        f"{costs[1]:.3f}",
        f"{costs[2] / 60:.1f} min",
        f"{costs[3]:.2f} GiB",
    )
    if record is not first and first.metrics:
        relative = (cost / of_first for cost, of_first in zip(costs, _costs(first), strict=True))
        texts = tuple(f"{text} ({100 * ratio:.0f} %)" for text, ratio in zip(texts, relative, strict=True))
    return [
        record.name,
        record.method,
        f"{last['step']:,}",
        f"{last['loss']:.4f}",
        f"{held_out[-1]:.4f}" if held_out else "-",
        *texts,
        *scores,
    ]


def _costs(record: RunRecord) -> tuple[float, float, float, float]:
    """Return parameters at the end, seconds of a step, seconds of all steps, and GiB."""
    seconds = [line["seconds"] for line in record.metrics]
    return (
        record.metrics[-1]["trainable_parameters"],
        median(seconds),
        sum(seconds),
        max(line["memory_gib"] for line in record.metrics),
    )


def _score(score: tuple[float, float, float]) -> str:
    value, low, high = (100 * part for part in score)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"
