"""The report of a study as Markdown, with the figure that decides: the tuning score over the learning rate."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dynrank_ds.files import replace_text
from dynrank_ds.report.canvas import SERIES, canvas, legend, open_axes, title
from dynrank_ds.study.definition import TUNING, Study
from dynrank_ds.study.outcome import (
    ArmOutcome,
    Comparison,
    TuningScore,
    arm_outcome,
    comparisons,
    has_budget_of,
    tuning_scores,
)
from dynrank_ds.study.statistics import detectable_difference, score_interval

REPORT, FIGURE, SCORES = "report.md", "learning_rates", "tuning.csv"
_RATE = "train.learning_rate"
_MARKERS = "osD^vP*X<>hp"


def write_study_report(study: Study, command: str, n_tuning: int, n_final: int) -> Path:
    """Write report.md, the figure and its data into the folder of the study's results, and return report.md.

    Args:
        command: that makes the report, which it names.
        n_tuning: problems that tune.
        n_final: problems that decide.
    """
    folder = Path(study.results)
    folder.mkdir(parents=True, exist_ok=True)
    tuned = {arm: tuning_scores(study, arm) for arm in study.arms}
    outcomes = {arm: one for arm in study.arms if (one := arm_outcome(study, arm))}
    replace_text(folder / SCORES, _csv(tuned))
    if any(one.records for scores in tuned.values() for one in scores):
        figure = _figure(study, tuned)
        figure.savefig(folder / f"{FIGURE}.png", format="png")
        figure.savefig(folder / f"{FIGURE}.svg", format="svg")
    lines = [
        f"# {study.about}",
        "",
        f"Written by `{command}` from the files beside it; the study is defined in the file that the command names.",
        "",
        *_design(study, n_tuning, n_final),
        "",
        *_outcome_table(study, outcomes),
        "",
        *_comparison_table(study, outcomes),
        "",
        *_verdict(study, outcomes),
        "",
        *_tuning_table(study, tuned),
        "",
        *_missing(study, tuned, outcomes),
    ]
    replace_text(folder / REPORT, "\n".join(lines).rstrip() + "\n")
    return folder / REPORT


def design_text(study: Study, n_tuning: int, n_final: int) -> str:
    """Return what the study does and which difference it can detect, before any run."""
    return "\n".join(_design(study, n_tuning, n_final))


def _design(study: Study, n_tuning: int, n_final: int) -> Iterator[str]:
    design, others, seeds = study.design, len(study.arms) - 1, len(study.final.seeds)
    one, all_others = (
        100
        * detectable_difference(
            n_final, seeds, design.score, design.correlation, design.seed_deviation, number
        )
        for number in (1, others)
    )
    tuned, final = _count(study.tuning.seeds), _count(study.final.seeds)
    yield (
        f"{len(study.arms)} arms, each tuned over its grid with {tuned} on {n_tuning} problems, then trained with "
        f"{final} at its best point and scored on {n_final} others; runs are matched by {study.budget.by}, within "
        f"{study.budget.tolerance:.0%}."
    )
    yield ""
    yield (
        f"Expected before any run: a score near {design.score:.0%}, a correlation of {design.correlation:g} between "
        f"two runs' verdicts on a problem, a standard deviation of {design.seed_deviation:.1%} over seeds. Then a test "
        f"at 5 % finds a difference of {one:.1f} points with a power of 80 %, and one of {all_others:.1f} points where "
        f"all {others} others are compared with {study.reference}."
    )


def _count(seeds: Sequence[int]) -> str:
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _outcome_table(study: Study, outcomes: dict[str, ArmOutcome]) -> Iterator[str]:
    yield "## Scores at the best point"
    yield ""
    columns = [
        "arm",
        "best point",
        "tuning score",
        "final score [95 %]",
        "each seed",
        "parameters",
        "at most",
    ]
    columns += ["minutes a run"] if study.timed else []
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for arm, one in outcomes.items():
        best = one.best.label + (", at the grid's edge" if one.is_at_edge else "")
        if one.shares:
            low, high = score_interval(one.shares)
            final = f"{_percent(float(np.mean(one.seed_scores)))} [{_percent(low)}, {_percent(high)}]"
            seeds = ", ".join(_percent(score) for score in one.seed_scores)
        else:
            final, seeds = "every run diverged", ""
        time = f" {one.mean('seconds') / 60:.1f} |" if study.timed else ""
        yield (
            f"| {arm} | {best} | {_percent(one.tuning_score)} | {final} | {seeds} | {one.mean('parameters'):,.0f} | "
            f"{one.mean('peak_parameters'):,.0f} |{time}"
        )
    yield ""
    yield (
        "Intervals are percentiles of the bootstrap over problems"
        + (" and seeds." if len(study.final.seeds) > 1 else ".")
        + " Parameters are the elements of all factors of the adapter that was scored; at most: the largest number of "
        "trainable parameters while it was trained."
    )


def _comparison_table(study: Study, outcomes: dict[str, ArmOutcome]) -> Iterator[str]:
    yield f"## Differences from {study.reference}, in points"
    yield ""
    yield "| arm | difference [95 %] | p | p after Holm | same budget |"
    yield "|---|---|---|---|---|"
    for arm, one in comparisons(study, outcomes).items():
        change = one.difference
        matched = has_budget_of(study, outcomes[arm], outcomes[study.reference])
        corrected = "" if one.corrected_p is None else _p(one.corrected_p)
        yield (
            f"| {arm} | {_points(change.mean)} [{_points(change.low)}, {_points(change.high)}] | "
            f"{_p(change.p_value)} | {corrected} | {'yes' if matched else 'no'} |"
        )
    yield ""
    yield (
        "Paired by problem; problems are resampled for both arms alike, seeds for each by itself. Arms without the "
        "reference's budget are shown and not tested together with the others."
    )


def _verdict(study: Study, outcomes: dict[str, ArmOutcome]) -> Iterator[str]:
    found = comparisons(study, outcomes)
    tested = {arm: one for arm, one in found.items() if one.corrected_p is not None}
    if not tested:
        yield f"No arm with the budget of {study.reference} is finished yet: nothing can be said."
        return
    for sign, word in ((1, "better"), (-1, "worse")):
        arms = [arm for arm, one in tested.items() if one.is_significant and sign * one.difference.mean > 0]
        yield f"- {word} than tuned {study.reference}, after Holm's correction: {', '.join(arms) or 'none'}."
    undecided = [arm for arm, one in tested.items() if not one.is_significant]
    yield f"- not told apart from it: {_with_limits(undecided, tested) or 'none'}."


def _with_limits(arms: Sequence[str], tested: dict[str, Comparison]) -> str:
    return "; ".join(
        f"{arm} (by this study between {_points(tested[arm].difference.low)} and "
        f"{_points(tested[arm].difference.high)} points)"
        for arm in arms
    )


def _tuning_table(study: Study, tuned: dict[str, list[TuningScore]]) -> Iterator[str]:
    yield "## Tuning"
    yield ""
    yield f"![tuning score over the learning rate]({FIGURE}.svg)"
    yield ""
    yield "| arm | point | tuning score |"
    yield "|---|---|---|"
    for arm, scores in tuned.items():
        for one in scores:
            diverged = ", diverged" if any(record.facts.diverged for record in one.records) else ""
            if one.records:
                yield f"| {arm} | {one.point.label} | {_percent(_mean(one))}{diverged} |"


def _missing(
    study: Study, tuned: dict[str, list[TuningScore]], outcomes: dict[str, ArmOutcome]
) -> Iterator[str]:
    unfinished = [arm for arm in study.arms if arm not in outcomes]
    if not unfinished:
        return
    yield "## Missing"
    yield ""
    for arm in unfinished:
        done = sum(len(one.records) for one in tuned[arm])
        wanted = len(tuned[arm]) * len(study.tuning.seeds)
        yield f"- {arm}: {done} of {wanted} tuning runs are done" + (
            ", final runs are not." if done == wanted else "."
        )


def _csv(tuned: dict[str, list[TuningScore]]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "point", "seed", "tuning score", "loss", "parameters", "seconds"])
    for arm, scores in tuned.items():
        for one in scores:
            for record in one.records:
                facts = record.facts
                score = round(record.score(TUNING), 6)
                row = [arm, one.point.label, record.seed, score, facts.loss, facts.parameters, facts.seconds]
                writer.writerow(row)
    return text.getvalue()


def _figure(study: Study, tuned: dict[str, list[TuningScore]]) -> Figure:
    figure, (axes,) = canvas(8, 4.6)
    title(axes, "Each arm at its own learning rate: compare the peaks, not a column")
    drawn = 0
    for arm, scores in tuned.items():
        lines = _lines(scores)
        for label, (rates, values) in lines.items():
            axes.plot(
                rates,
                [100 * value for value in values],
                label=f"{arm} {label}".strip(),
                color=SERIES[drawn % len(SERIES)],
                linestyle=("-", "--", ":")[drawn // len(SERIES) % 3],
                marker=_MARKERS[drawn % len(_MARKERS)],
                markersize=5,
            )
            drawn += 1
    axes.set_xscale("log")
    axes.set_xlabel("train.learning_rate")
    axes.set_ylabel("tuning score, %")
    axes.set_ylim(bottom=0)
    open_axes([axes])
    legend(axes)
    return figure


def _lines(scores: Sequence[TuningScore]) -> dict[str, tuple[list[float], list[float]]]:
    """Return rates and scores, one line for each combination of the grid's other keys."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for one in scores:
        if one.records and _RATE in one.point.values:
            others = {key: value for key, value in one.point.values.items() if key != _RATE}
            label = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in others.items())
            rates, values = found.setdefault(label, ([], []))
            rates.append(float(str(one.point.values[_RATE])))
            values.append(_mean(one))
    return found


def _mean(one: TuningScore) -> float:
    return float(np.mean([record.score(TUNING) for record in one.records]))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"
