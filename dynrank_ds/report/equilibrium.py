"""Figures of dynamic DoRA's dimensional equilibrium modulator (DEM) and its effect on the triples.

Mao et al. (2024), section 3.4, eq. 10: the penalty is the mean sample variance of all rows of A and B, times eta.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynrank_ds.checkpoint.adapter import TrainedAdapter
from dynrank_ds.report.canvas import INK, SERIES, Plot, canvas, legend, marker, open_axes, title
from dynrank_ds.report.record import RunRecord

_METHOD = "dynamic_dora"


def equilibrium_plots(record: RunRecord, others: Sequence[RunRecord]) -> list[Plot]:
    """Return the figures of DEM; none of runs of other methods.

    others: compared runs, of which those of dynamic DoRA are shown beside this one.
    """
    records = [one for one in (record, *others) if one.method == _METHOD]
    if record.method != _METHOD:
        return []
    plots = []
    if any(_equilibrium(one) for one in records):
        plots.append(_course(records))
    if record.checkpoint is not None and any(record.end.values()):
        plots.append(_variances(records))
    return plots


def row_variances(record: RunRecord) -> dict[str, np.ndarray]:
    """Return the sample variance of every row of A and of B in the newest checkpoint."""
    found: dict[str, list[np.ndarray]] = {"A": [], "B": []}
    if record.checkpoint is not None:
        with TrainedAdapter(record.checkpoint) as adapter:
            for linear in adapter.linears:
                for a, b in adapter.factors(linear):
                    found["A"].append(a.double().var(dim=1).numpy())
                    found["B"].append(b.double().var(dim=1).numpy())
    return {factor: np.concatenate(parts) if parts else np.zeros(0) for factor, parts in found.items()}


def _eta(record: RunRecord) -> float:
    """Return the weight of the penalty, which the run's recipe has."""
    return float(record.recipe.get("method", {}).get("variance", 0))


def _label(record: RunRecord) -> str:
    return f"{record.name}, eta {_eta(record):g}"


def _equilibrium(record: RunRecord) -> list[tuple[int, float]]:
    """Return step and mean variance of the steps whose loss had the penalty."""
    eta = _eta(record)
    if not eta:
        return []
    return [(line["step"], line["penalty"] / eta) for line in record.metrics if line.get("penalty")]


def _course(records: Sequence[RunRecord]) -> Plot:
    figure, [axes] = canvas(width=11, height=2.8)
    rows: list[tuple[str, int, float]] = []
    for number, record in enumerate(records):
        points = _equilibrium(record)
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=SERIES[number % len(SERIES)],
                marker=marker(len(points)),
                linewidth=1.6,
                label=_label(record),
            )
        rows += [(record.name, step, value) for step, value in points]
    values = [value for _, _, value in rows]
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("mean variance of a row")
    open_axes([axes], [line["step"] for line in records[0].adjustments])
    legend(axes, ncols=1)
    title(axes, "Dimensional equilibrium: mean variance within the rows of A and B, until the last mask")
    return Plot(
        "equilibrium",
        figure,
        "Mean variance of the rows of A and B over the steps",
        "The penalty of dynamic DoRA (DEM; Mao et al., eq. 10) divided by its weight eta: the mean sample variance of "
        "all rows a_i and b_i, masked triples included, with the normalisation of the authors' code, half of what "
        "eq. 10 prints. It ends with the last mask. A run with eta 0 has no such penalty and logs none.",
        ("run", "step", "mean variance of a row"),
        rows,
    )


def _variances(records: Sequence[RunRecord]) -> Plot:
    found = [(record, row_variances(record)) for record in records]
    figure, panels = canvas(width=11, height=4.6, heights=(1, 1))
    rows: list[tuple[object, ...]] = []
    for panel, factor in zip(panels, ("A", "B"), strict=True):
        everything = np.concatenate([variances[factor] for _, variances in found])
        bins = np.histogram_bin_edges(np.log10(everything[everything > 0]), bins="auto").tolist()
        for number, (record, variances) in enumerate(found):
            positive = variances[factor][variances[factor] > 0]
            colour = SERIES[number % len(SERIES)]
            panel.hist(
                np.log10(positive), bins, histtype="step", color=colour, linewidth=1.6, label=_label(record)
            )
            rows += [(record.name, factor, value) for value in variances[factor].tolist()]
        for value in _initial_variances(records[0])[factor]:
            panel.axvline(np.log10(value), color=INK, linestyle=":", linewidth=1)
        panel.set_ylabel(f"rows of {factor}")
    panels[-1].set_xlabel("log10 of the variance within a row")
    open_axes(panels)
    legend(panels[0], ncols=1)
    title(panels[0], "What DEM does: variance within each row in the newest checkpoint; dotted: as it began")
    return Plot(
        "row_variance",
        figure,
        "Histogram of the variances of the rows of A and B in the newest checkpoint",
        "DEM pulls a row's elements together, so that no few dimensions carry a component (Mao et al., section 3.4): "
        "further left is more even. Rows of A begin at variance 2 / in, rows of B at 2 / r. To see the effect apart "
        "from that of training, --compare a run with method.variance=0.",
        ("run", "factor", "variance within the row"),
        rows,
    )


def _initial_variances(record: RunRecord) -> dict[str, set[float]]:
    """Return the variances of the method's own initial values; none of a run that began with another adapter."""
    if record.recipe.get("adapter", {}).get("init_from") is not None or record.checkpoint is None:
        return {"A": set(), "B": set()}
    with TrainedAdapter(record.checkpoint) as adapter:
        sides = {shape.in_features for shape in adapter.linears.values()}
    return {"A": {2 / side for side in sides}, "B": {2 / rank for rank in record.start.values() if rank}}
