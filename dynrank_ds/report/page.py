"""One self-contained HTML page on a run: what the ranks did."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dynrank_ds.files import replace_text
from dynrank_ds.report.adapters import effective_ranks, utilisation_plots
from dynrank_ds.report.canvas import DPI, Plot
from dynrank_ds.report.comparison import TABLE_NOTE, comparison_plot, comparison_table
from dynrank_ds.report.equilibrium import equilibrium_plots
from dynrank_ds.report.evaluation import (
    PairedDifference,
    difference_table,
    evaluation_plots,
    paired_differences,
)
from dynrank_ds.report.progress import progress_plots
from dynrank_ds.report.ranks import rank_plots
from dynrank_ds.report.record import RunRecord, read_run
from dynrank_ds.report.scores import score_plots
from dynrank_ds.report.summary import movers, remarks, summary


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
    record, *others = _records([run, *compare])
    differences, unpaired = paired_differences(record, others)
    plots = [
        *rank_plots(record),
        *progress_plots(record),
        *score_plots(record),
        *utilisation_plots(effective_ranks(record)),
        *equilibrium_plots(record, others),
        *evaluation_plots(record, others, differences),
    ]
    if others:
        plots.append(comparison_plot([record, *others]))
    page = output or run / "report.html"
    folder = page.parent / "report"
    folder.mkdir(parents=True, exist_ok=True)
    grown, shrunk = movers(record)
    environment = Environment(
        loader=PackageLoader("dynrank_ds.report", "."), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html.j2").render(
        title=f"Ranks of {record.name}",
        summary=summary(record),
        remarks=[*remarks(record), *unpaired],
        plots=[_written(plot, folder) for plot in plots],
        movers={"Grown most": grown, "Shrunk most": shrunk},
        start=record.start,
        end=record.end,
        tables=_tables([record, *others], differences),
        renew_seconds=renew_seconds,
    )
    replace_text(page, text)
    return page


def _records(runs: Sequence[Path]) -> list[RunRecord]:
    """Read the runs; where two have the same name, it is that of the folder above them too."""
    records = [read_run(run) for run in runs]
    names = [record.name for record in records]
    return [
        replace(record, name="/".join(run.resolve().parts[-2:])) if names.count(record.name) > 1 else record
        for run, record in zip(runs, records, strict=True)
    ]


def _tables(records: Sequence[RunRecord], differences: Sequence[PairedDifference]) -> list[dict[str, Any]]:
    """Return the tables of a comparison; none of one run alone."""
    tables = []
    if len(records) > 1:
        head, rows = comparison_table(records)
        tables.append({"heading": "Compared runs", "head": head, "rows": rows, "note": TABLE_NOTE})
    if differences:
        head, rows = difference_table(differences)
        note = f"Score of {records[0].name} less that of the other run, on the same problems."
        tables.append({"heading": "Paired differences of scores", "head": head, "rows": rows, "note": note})
    return tables


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
