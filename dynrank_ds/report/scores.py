"""Figures of the scores by which ranks were adjusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize

from dynrank_ds.report.canvas import (
    BLUE,
    INK,
    ORDERED,
    RED,
    SERIES,
    Plot,
    canvas,
    colour_bar,
    legend,
    marker,
    open_axes,
    strip,
    title,
)
from dynrank_ds.report.grids import mark_kinds
from dynrank_ds.report.places import in_model_order
from dynrank_ds.report.record import RunRecord


def score_plots(record: RunRecord) -> list[Plot]:
    """Return the figures of scores; none where no adjustment logged any."""
    if not record.adjustments or not all(line.get("scores") for line in record.adjustments):
        return []
    return [_importance(record), _histogram(record), _correlation(record), _variance(record)]


def module_importances(record: RunRecord) -> tuple[list[str], np.ndarray]:
    """Return the modules in the model's order, and (adjustments, modules): the mean score of each one's triples."""
    modules = in_model_order(record.start)
    means = [
        [float(np.mean(line["scores"][module])) if line["scores"][module] else 0.0 for module in modules]
        for line in record.adjustments
    ]
    return modules, np.array(means)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; ties have their mean rank; nan where one side is constant."""
    ranks = [_mean_ranks(np.asarray(values, float)) for values in (first, second)]
    centred = [r - r.mean() for r in ranks]
    norm = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / norm) if norm else float("nan")


def log_ratio_variance(importance: np.ndarray, ranks: np.ndarray) -> float:
    """Return the variance over modules of log(G^(2/3) / r), of those whose G and r are above 0."""
    used = (importance > 0) & (ranks > 0)
    return (
        float(np.var(np.log(importance[used] ** (2 / 3) / ranks[used]))) if used.sum() > 1 else float("nan")
    )


def ratio_log_variance(importance: np.ndarray, ranks: np.ndarray) -> float:
    """Return the logarithm of the variance over modules of G^(2/3) / r, of those that `log_ratio_variance` counts."""
    used = (importance > 0) & (ranks > 0)
    variance = float(np.var(importance[used] ** (2 / 3) / ranks[used])) if used.sum() > 1 else 0.0
    return float(np.log(variance)) if variance else float("nan")


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _importance(record: RunRecord) -> Plot:
    modules, means = module_importances(record)
    places = np.argsort(np.argsort(-means, axis=1, kind="stable"), axis=1) + 1
    figure, [axes] = canvas(width=11, height=1.9 + 0.24 * min(max(len(places), 6), 30))
    image = strip(axes, places, (ORDERED, Normalize(1, len(modules))))
    mark_kinds(axes, modules, "white")
    shown = np.unique(np.linspace(0, len(places) - 1, min(len(places), 20)).round().astype(int))
    axes.set_yticks(shown, [f"{record.adjustments[row]['step']:,}" for row in shown])
    axes.set_ylabel("adjustment at step")
    title(axes, "Place of every module by the mean score of its triples; dark: the most important")
    colour_bar(figure, axes, image, "place")
    rows = [
        (line["step"], module, means[i, j], int(places[i, j]))
        for i, line in enumerate(record.adjustments)
        for j, module in enumerate(modules)
    ]
    return Plot(
        "importance",
        figure,
        "Ranking of the modules by mean score at each adjustment",
        "Scores are those of the method, logged before each adjustment; place 1 has the highest mean.",
        ("step of the adjustment", "module", "mean score", "place"),
        rows,
    )


def _histogram(record: RunRecord) -> Plot:
    chosen = sorted({0, len(record.adjustments) // 2, len(record.adjustments) - 1})
    figure, [axes] = canvas(width=11, height=3)
    rows = []
    for colour, number in zip(SERIES, chosen, strict=False):
        line = record.adjustments[number]
        values = np.concatenate([np.asarray(s, float) for s in line["scores"].values() if s])
        rows += [(line["step"], value) for value in values.tolist()]
        positive = values[values > 0]
        if not len(positive):
            continue
        label = f"step {line['step']:,}" + (
            f", {len(values) - len(positive)} at 0 left out" if (values <= 0).any() else ""
        )
        axes.hist(np.log10(positive), bins=40, histtype="step", color=colour, linewidth=1.6, label=label)
    axes.set_xlabel("log10 of a triple's score")
    axes.set_ylabel("triples")
    open_axes([axes])
    if axes.patches:
        legend(axes, ncols=1)
    title(axes, "Scores of all triples at the first, a middle and the last adjustment")
    return Plot(
        "scores",
        figure,
        "Histogram of the scores of all triples at three adjustments",
        "Compare ElaLoRA, Fig. 5. Scores of different methods have different scales.",
        ("step of the adjustment", "score"),
        rows,
    )


def _correlation(record: RunRecord) -> Plot:
    modules, means = module_importances(record)
    importance = means.mean(axis=0)
    ranks = np.array([[line["after"][m] for m in modules] for line in record.adjustments], float).mean(axis=0)
    rho = spearman(importance.tolist(), ranks.tolist())
    figure, [axes] = canvas(width=6, height=3.6)
    axes.scatter(importance, ranks, s=14, color=BLUE, alpha=0.7, linewidths=0)
    if (importance > 0).all():
        axes.set_xscale("log")
    axes.set_xlabel("mean score of the module's triples, over all adjustments")
    axes.set_ylabel("mean rank")
    open_axes([axes])
    found = "not defined: one of them is the same everywhere" if np.isnan(rho) else f"{rho:.2f}"
    title(axes, f"Rank follows importance: Spearman's rho {found}")
    return Plot(
        "correlation",
        figure,
        "Mean rank over mean score of every module",
        "A point is a module; both are means over the adjustments. Compare PE-DyRA, Fig. 4b.",
        ("module", "mean score", "mean rank"),
        list(zip(modules, importance.tolist(), ranks.tolist(), strict=True)),
    )


def _variance(record: RunRecord) -> Plot:
    modules = in_model_order(record.start)
    start = np.array([record.start[m] for m in modules], float)
    rows = []
    for line in record.adjustments:
        importance = np.array([float(np.sum(line["scores"][m])) for m in modules])
        ranks = np.array([line["after"][m] for m in modules], float)
        rows.append(
            (
                line["step"],
                log_ratio_variance(importance, ranks),
                log_ratio_variance(importance, start),
                ratio_log_variance(importance, ranks),
                ratio_log_variance(importance, start),
            )
        )
    figure, [axes] = canvas(width=11, height=2.8)
    steps = [row[0] for row in rows]
    axes.plot(
        steps,
        [row[1] for row in rows],
        color=RED,
        marker="o",
        markersize=3,
        label="ranks after the adjustment",
    )
    axes.plot(
        steps,
        [row[2] for row in rows],
        color=INK,
        linestyle="--",
        linewidth=1,
        marker=marker(len(rows)),
        label="initial ranks",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("variance")
    if any(value > 0 for row in rows for value in row[1:3]):
        axes.set_yscale("log")
    open_axes([axes])
    legend(axes)
    title(axes, "Variance over modules of log(G^(2/3) / r): lower is nearer to PE-DyRA's Theorem 3.1")
    return Plot(
        "variance",
        figure,
        "Variance of log(G^(2/3) / r) over the modules at each adjustment",
        "G is the sum of the scores of a module's triples, r its rank; the theorem's optimum has r proportional to "
        "G^(2/3) and variance 0. Compare PE-DyRA, Fig. 5, whose wording also allows the logarithm of the variance of "
        "G^(2/3) / r. The first is drawn here, on a logarithmic axis; the data has both. The dashed line is what "
        "fixed ranks would have with the same scores.",
        (
            "step of the adjustment",
            "variance, ranks after it",
            "variance, initial ranks",
            "log of the variance of the ratio, ranks after it",
            "log of the variance of the ratio, initial ranks",
        ),
        rows,
    )
