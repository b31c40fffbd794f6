"""One self-contained HTML page on a run: what the ranks did."""

import base64
import io
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dynrank_ds.checkpoint.files import newest_checkpoint, read_state
from dynrank_ds.errors import RunError
from dynrank_ds.report.figures import DPI, course, rank_heatmap, rank_history

logger = logging.getLogger(__name__)

_TABLE_ROWS = 10


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says about its course.

    Attributes:
        metrics: the lines of metrics.jsonl, by step.
        adjustments: the lines of ranks.jsonl, by step; empty for a fixed rank.
        start, end: the rank of every module at the beginning and now.
        method, base_model: as the newest checkpoint names them.
    """

    name: str
    metrics: list[dict[str, Any]]
    adjustments: list[dict[str, Any]]
    start: dict[str, int]
    end: dict[str, int]
    method: str
    base_model: str


def read_run(run: Path) -> RunRecord:
    """Read a run directory that holds metrics and at least one checkpoint.

    Raises:
        RunError: if either is missing or a line cannot be read.
    """
    metrics = _lines_by_step(run / "metrics.jsonl")
    if not metrics:
        raise RunError(
            f"{run / 'metrics.jsonl'} does not exist or is empty: name the folder of a training run"
        )
    adjustments = _lines_by_step(run / "ranks.jsonl")
    state = read_state(newest_checkpoint(run))
    final = {module: shape["rank"] for module, shape in state["blocks"].items()}
    return RunRecord(
        name=run.resolve().name,
        metrics=metrics,
        adjustments=adjustments,
        start=adjustments[0]["before"] if adjustments else final,
        end=adjustments[-1]["after"] if adjustments else final,
        method=state["method"],
        base_model=state["base_model"],
    )


def _lines_by_step(path: Path) -> list[dict[str, Any]]:
    """Return the lines in the order of their steps; of a step that a resumed run did again, the later line."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}, is not JSON ({error})") from error
            logger.warning("%s: the last line is cut short (a killed run) and left out", path)
            continue
        if not entry.get("discarded"):  # logged under the step before, whose line it would replace
            found[entry["step"]] = entry
    return [found[step] for step in sorted(found)]


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the page on the run directory `run`, and its pictures as PNG files into the folder `report` beside it.

    Args:
        run: the run directory.
        output: the page's path; by default report.html in the run directory.

    Returns:
        The page's path.

    Raises:
        RunError: if the run has no metrics or no checkpoint.
    """
    record = read_run(run)
    page = output or run / "report.html"
    folder = page.parent / "report"
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for name, figure in _figures(record).items():
        png = _png(figure)
        (folder / f"{name}.png").write_bytes(png)
        images.append(_image(png, _ALT[name], width=round(figure.get_figwidth() * DPI / 2)))
    page.write_text(_html(record, images), encoding="utf-8")
    return page


def _figures(record: RunRecord) -> dict[str, Figure]:
    steps = [line["step"] for line in record.adjustments]
    figures = {"ranks": rank_heatmap(record.start, record.end)}
    if record.adjustments:
        moves = [(line["step"], line["after"]) for line in record.adjustments]
        figures["history"] = rank_history(moves, record.start)
    return figures | {"course": course(record.metrics, steps)}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _summary(record: RunRecord) -> dict[str, str]:
    first, last = record.metrics[0], record.metrics[-1]
    changed = sum(record.end[module] != record.start[module] for module in record.end)
    return {
        "Method": record.method,
        "Base model": record.base_model,
        "Steps": f"{last['step']:,}",
        "Loss, first and last step": f"{first['loss']:.4f} → {last['loss']:.4f}",
        "Adjustments": f"{len(record.adjustments)}",
        "Modules whose rank changed": f"{changed} of {len(record.end)}",
        "Total rank": f"{sum(record.start.values()):,} → {sum(record.end.values()):,}",
        "Rank of a module": f"{_span(record.start)} → {_span(record.end)}",
        "Trainable parameters": f"{first['trainable_parameters']:,} → {last['trainable_parameters']:,}",
        "Tokens per second, median": f"{_median(line['tokens_per_second'] for line in record.metrics):,.0f}",
        "Peak memory": f"{max(line['memory_gib'] for line in record.metrics):.2f} GiB",
    }


def _span(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return f"{low}" if low == high else f"{low} to {high}"


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _movers(record: RunRecord) -> tuple[list[str], list[str]]:
    """Return the modules that grew and that shrank most, ties by name."""
    change = {module: rank - record.start[module] for module, rank in record.end.items()}
    grown = sorted(
        (module for module in change if change[module] > 0), key=lambda module: (-change[module], module)
    )
    shrunk = sorted(
        (module for module in change if change[module] < 0), key=lambda module: (change[module], module)
    )
    return grown[:_TABLE_ROWS], shrunk[:_TABLE_ROWS]


def _table(title: str, modules: list[str], record: RunRecord) -> str:
    rows = "".join(
        f"<tr><td>{escape(module)}</td><td>{record.start[module]}</td><td>{record.end[module]}</td>"
        f"<td>{record.end[module] - record.start[module]:+d}</td></tr>"
        for module in modules
    )
    head = "<tr><th>module</th><th>start</th><th>end</th><th>change</th></tr>"
    body = f"<table class='ranks'>{head}{rows}</table>" if rows else "<p>None.</p>"
    return f"<div><h3>{title}</h3>{body}</div>"


def _image(png: bytes, alt: str, width: int) -> str:
    data = base64.b64encode(png).decode()
    return f"<div class='picture'><img alt='{escape(alt)}' width='{width}' src='data:image/png;base64,{data}'></div>"


def _html(record: RunRecord, images: Iterable[str]) -> str:
    summary = "".join(
        f"<tr><th>{key}</th><td>{escape(value)}</td></tr>" for key, value in _summary(record).items()
    )
    grown, shrunk = _movers(record)
    tables = _table("Grown most", grown, record) + _table("Shrunk most", shrunk, record)
    return _PAGE.format(
        title=escape(f"Ranks of {record.name}"),
        summary=summary,
        images="".join(images),
        tables=tables,
        style=_STYLE,
    )


_ALT = {
    "ranks": "Final rank of every module by kind and layer",
    "history": "Change of every module's rank at each adjustment",
    "course": "Loss and total rank over the steps",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h3 { font-size: 1.05rem; margin-bottom: .3rem; }
.picture { overflow-x: auto; margin: 1.8rem 0; } img { display: block; }
table { border-collapse: collapse; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #e4e8ec; }
th { font-weight: 600; color: #52606d; }
.ranks td:nth-child(n+2), .ranks th:nth-child(n+2) { text-align: right; font-variant-numeric: tabular-nums; }
.pair { display: flex; flex-wrap: wrap; gap: 0 4rem; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
<h1>{title}</h1>
<table>{summary}</table>
{images}
<div class="pair">{tables}</div>
</body>
</html>
"""
