"""Scores of the runs by dynrank-eval: with intervals, and the paired difference where the problems are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynrank_ds.errors import DynrankError
from dynrank_ds.report.canvas import DPI, INK, SERIES, Plot, open_axes, style, title
from dynrank_ds.report.record import RunRecord


@dataclass(frozen=True)
class PairedDifference:
    """The score of this run less that of another one on the same problems, as shares of 1."""

    task: str
    other: str
    """Name of the other run."""
    problems: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str


def paired_differences(
    record: RunRecord, others: Sequence[RunRecord]
) -> tuple[list[PairedDifference], list[str]]:
    """Compare the run's scores with the others' problem by problem, as `dynrank-eval compare` does.

    Returns:
        The differences, and a sentence for each run with scores that cannot be paired with this run's.
    """
    if record.evaluation is None:
        return [], []
    # Here, since it is not installed where only training is; its statistics are not written a second time.
    from dynrank_eval.comparison import compare

    differences, remarks = [], []
    for other in others:
        if other.evaluation is None:
            continue
        try:
            pairs = compare(other.evaluation, record.evaluation)
        except DynrankError as error:
            remarks.append(f"The scores of {record.name} and {other.name} are not paired: {error}")
            continue
        for pair in pairs:
            test = str(pair.as_json()["test"])
            differences.append(
                PairedDifference(
                    pair.task, other.name, pair.n, pair.difference, *pair.interval, pair.p_value, test
                )
            )
    return differences, remarks


def evaluation_plots(
    record: RunRecord, others: Sequence[RunRecord], differences: Sequence[PairedDifference]
) -> list[Plot]:
    """Return the figure of scores and differences; none where no run has scores."""
    records = [one for one in (record, *others) if one.scores]
    if not records:
        return []
    tasks = sorted({task for one in records for task in one.scores})
    height = 1.3 + 0.22 * len(tasks) * (len(records) + 1)
    figure = Figure(figsize=(11, height), dpi=DPI, layout="constrained", facecolor="white")
    columns = 2 if differences else 1
    axes: list[Axes] = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    for one in axes:
        style(one)
        one.set_yticks(range(len(tasks)), tasks)
        one.set_ylim(len(tasks) - 0.5, -0.5)
        one.tick_params(axis="y", length=0)
    _draw_scores(axes[0], records, tasks)
    title(axes[0], "Score, with 95 % interval")
    if differences:
        _draw_differences(axes[1], records, tasks, differences)
        title(axes[1], f"Paired difference: {record.name} less the other run")
    open_axes(axes)
    axes[-1].margins(x=0.15)  # room for the p-values
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9, ncols=3
    )
    rows: list[tuple[object, ...]] = [
        ("score", task, one.name, *one.scores[task], None) for one in records for task in one.scores
    ]
    rows += [
        (f"difference, {d.test}", d.task, d.other, d.difference, d.low, d.high, d.p_value)
        for d in differences
    ]
    caption = (
        "Scores of dynrank-eval in the folder eval (or eval/all) of each run, in percent, with Wilson's 95 % interval, "
        "or the bootstrap over problems where there are several completions of each."
    )
    if differences:
        caption += (
            " The difference is taken problem by problem, in points, with Agresti and Min's 95 % interval, or the "
            "paired bootstrap; p by McNemar's exact test, or a permutation test. Where intervals of two scores "
            "overlap, the difference may still be clear: it is what to read."
        )
    return [
        Plot(
            "evaluation",
            figure,
            "Scores of the runs with intervals" + (", and paired differences" if differences else ""),
            caption,
            ("what", "task", "run", "value", "low", "high", "p"),
            rows,
        )
    ]


def difference_table(differences: Sequence[PairedDifference]) -> tuple[list[str], list[list[str]]]:
    """Return the head and rows of the table of paired differences."""
    head = ["task", "problems", "compared with", "difference in points, 95 % interval", "p", "test"]
    return head, [
        [
            d.task,
            f"{d.problems:,}",
            d.other,
            f"{100 * d.difference:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]",
            f"{d.p_value:.2g}",
            d.test,
        ]
        for d in differences
    ]


def _draw_scores(axes: Axes, records: Sequence[RunRecord], tasks: Sequence[str]) -> None:
    for number, record in enumerate(records):
        colour = SERIES[number % len(SERIES)]
        found = [(row, record.scores[task]) for row, task in enumerate(tasks) if task in record.scores]
        for row, (score, low, high) in found:
            _draw_interval(axes, row + _offset(number, len(records)), score, low, high, colour)
        axes.plot([], [], "o-", color=colour, markersize=5, label=f"{record.name} ({record.method})")
    axes.set_xlabel("score in percent")


def _draw_differences(
    axes: Axes, records: Sequence[RunRecord], tasks: Sequence[str], differences: Sequence[PairedDifference]
) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    numbers = {one.name: number for number, one in enumerate(records)}
    for d in differences:
        number = numbers[d.other]
        place = tasks.index(d.task) + _offset(number, len(records))
        _draw_interval(axes, place, d.difference, d.low, d.high, SERIES[number % len(SERIES)])
        right = (100 * max(d.difference, d.high), place)
        axes.annotate(
            f"p {d.p_value:.2g}", right, (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlabel("points")


def _draw_interval(axes: Axes, place: float, value: float, low: float, high: float, colour: str) -> None:
    """Draw a value and its interval, which need not hold it: Agresti and Min's is not centred on the difference."""
    axes.plot([100 * low, 100 * high], [place, place], "|-", color=colour, linewidth=1.5, markersize=7)
    axes.plot([100 * value], [place], "o", color=colour, markersize=5)


def _offset(number: int, records: int) -> float:
    """Return how far below its task's line a run is drawn, so that runs do not cover each other."""
    return 0.6 * ((number + 0.5) / records - 0.5)
