"""One self-contained HTML page on a run: what the ranks did."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dynrank_ds.files import replace_text
from dynrank_ds.report.adapters import adapter_plots
from dynrank_ds.report.canvas import DPI, Plot
from dynrank_ds.report.comparison import comparison_plot, comparison_table
from dynrank_ds.report.progress import progress_plots
from dynrank_ds.report.ranks import rank_plots
from dynrank_ds.report.record import RunRecord, read_run
from dynrank_ds.report.scores import score_plots

_TABLE_ROWS = 10


def write_report(
    run: Path, output: Path | None = None, compare: Sequence[Path] = (), renew_seconds: int | None = None
) -> Path:
    """Write the page on the run directory `run`, and each figure's PNG, SVG and CSV into the folder `report` beside it.

    Args:
        run: the run directory; the run may still be training, or have been killed.
        output: the page's path; by default report.html in the run directory.
        compare: run directories whose losses and costs are shown beside this run's.
        renew_seconds: an open page loads itself again after so many seconds.

    Returns:
        The page's path.

    Raises:
        RunError: one of the folders holds no run, or its newest checkpoint is damaged.
    """
    record = read_run(run)
    others = [read_run(path) for path in compare]
    plots = [*rank_plots(record), *progress_plots(record), *score_plots(record), *adapter_plots(record)]
    if others:
        plots.append(comparison_plot([record, *others]))
    page = output or run / "report.html"
    folder = page.parent / "report"
    folder.mkdir(parents=True, exist_ok=True)
    grown, shrunk = _movers(record)
    environment = Environment(
        loader=PackageLoader("dynrank_ds.report", "."), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html.j2").render(
        title=f"Ranks of {record.name}",
        summary=_summary(record),
        remarks=_remarks(record),
        plots=[_written(plot, folder) for plot in plots],
        movers={"Grown most": grown, "Shrunk most": shrunk},
        start=record.start,
        end=record.end,
        comparison=comparison_table([record, *others]) if others else None,
        renew_seconds=renew_seconds,
    )
    replace_text(page, text)
    return page


def _written(plot: Plot, folder: Path) -> dict[str, Any]:
    """Write the figure's files; return what the page shows of it."""
    picture = io.BytesIO()
    plot.figure.savefig(picture, format="png")
    (folder / f"{plot.name}.png").write_bytes(picture.getvalue())
    plot.figure.savefig(folder / f"{plot.name}.svg", format="svg")
    with (folder / f"{plot.name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([plot.columns, *plot.rows])
    return {
        "data": base64.b64encode(picture.getvalue()).decode(),
        "alt": plot.alt,
        "caption": plot.caption,
        "files": [f"report/{plot.name}.{ending}" for ending in ("svg", "csv")],
        "width": round(plot.figure.get_figwidth() * DPI / 2),
    }


def _remarks(record: RunRecord) -> list[str]:
    """Return what is not there to be shown yet."""
    remarks = []
    if not record.metrics:
        remarks.append("No step was finished yet: there is nothing to show.")
    elif not record.adjustments:
        remarks.append("Ranks were never adjusted: fixed ranks, or no adjustment yet.")
    if record.metrics and record.checkpoint is None:
        remarks.append("No checkpoint was written yet: what the adapters use of their ranks is not shown.")
    return remarks


def _summary(record: RunRecord) -> dict[str, str]:
    summary = {"Method": record.method, "Base model": record.base_model}
    if record.metrics:
        first, last = record.metrics[0], record.metrics[-1]
        summary |= {
            "Steps": f"{last['step']:,}",
            "Loss, first and last step": f"{first['loss']:.4f} → {last['loss']:.4f}",
            "Trainable parameters": f"{first['trainable_parameters']:,} → {last['trainable_parameters']:,}",
            "Tokens per second, median": f"{median_high(line['tokens_per_second'] for line in record.metrics):,.0f}",
            "Peak memory": f"{max(line['memory_gib'] for line in record.metrics):.2f} GiB",
        }
    if record.end:
        changed = sum(record.end[module] != record.start[module] for module in record.end)
        summary |= {
            "Adjustments": f"{len(record.adjustments)}",
            "Modules whose rank changed": f"{changed} of {len(record.end)}",
            "Total rank": f"{sum(record.start.values()):,} → {sum(record.end.values()):,}",
            "Rank of a module": f"{_span(record.start)} → {_span(record.end)}",
        }
    for task, (score, low, high) in record.scores.items():
        summary[f"Score, {task}"] = f"{100 * score:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return summary


def _span(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return f"{low}" if low == high else f"{low} to {high}"


def _movers(record: RunRecord) -> tuple[list[str], list[str]]:
    """Return the modules that grew and that shrank most, ties by name."""
    change = {module: rank - record.start[module] for module, rank in record.end.items()}
    grown = sorted((m for m in change if change[m] > 0), key=lambda module: (-change[module], module))
    shrunk = sorted((m for m in change if change[m] < 0), key=lambda module: (change[module], module))
    return grown[:_TABLE_ROWS], shrunk[:_TABLE_ROWS]
