"""The report's text on a run: its table of figures, what is missing and why, and the modules that moved most."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_high

from dynrank_ds.methods import METHODS
from dynrank_ds.report.record import RunRecord

_MOVERS = 10


def summary(record: RunRecord) -> dict[str, str]:
    """Return what the page's first table says, by the words before it."""
    found = {"Method": record.method, "Base model": record.base_model}
    if record.state:
        running = record.state["state"] in ("starting", "running")  # written with the step of then
        step = record.metrics[-1]["step"] if running and record.metrics else record.state["step"]
        found["State"] = f"{record.state['state']}, step {step:,}{_of_all(record)}"
    if record.metrics:
        first, last = record.metrics[0], record.metrics[-1]
        found |= {
            "Steps": f"{last['step']:,}",
            "Loss, first and last step": f"{first['loss']:.4f} → {last['loss']:.4f}",
            "Trainable parameters": f"{first['trainable_parameters']:,} → {last['trainable_parameters']:,}",
            "Tokens per second, median": f"{median_high(line['tokens_per_second'] for line in record.metrics):,.0f}",
            "Peak memory": f"{max(line['memory_gib'] for line in record.metrics):.2f} GiB",
        }
    if record.end:
        changed = sum(record.end[module] != record.start[module] for module in record.end)
        found |= {
            "Adjustments": f"{len(record.adjustments)}",
            "Modules whose rank changed": f"{changed} of {len(record.end)}",
            "Total rank": f"{sum(record.start.values()):,} → {sum(record.end.values()):,}",
            "Rank of a module": f"{_span(record.start)} → {_span(record.end)}",
        }
    for task, (score, low, high) in record.scores.items():
        found[f"Score, {task}"] = f"{100 * score:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return found


def remarks(record: RunRecord) -> list[str]:
    """Return how the run stands where it did not finish, and what is not there to be shown."""
    found = [_state(record)]
    if not record.metrics:
        found.append("No step was finished yet: there is nothing to show.")
    elif not record.adjustments:
        found.append(_without_adjustment(record))
    if len(record.metrics) == 1:
        found.append("One step was finished: curves are single points.")
    if record.metrics and record.checkpoint is None:
        found.append(
            "No checkpoint was written yet: what the adapters use of their ranks is not shown"
            + (", nor their ranks." if not record.end else ".")
        )
    return [remark for remark in found if remark]


def movers(record: RunRecord) -> tuple[list[str], list[str]]:
    """Return the modules that grew and that shrank most, ties by name."""
    change = {module: rank - record.start[module] for module, rank in record.end.items()}
    grown = sorted((m for m in change if change[m] > 0), key=lambda module: (-change[module], module))
    shrunk = sorted((m for m in change if change[m] < 0), key=lambda module: (change[module], module))
    return grown[:_MOVERS], shrunk[:_MOVERS]


def _state(record: RunRecord) -> str:
    state = record.state
    if not state or state["state"] == "finished":
        return ""
    if state["state"] in ("starting", "running"):
        last = f"step {record.metrics[-1]['step']:,}" if record.metrics else "no step"
        return (
            f"The run has not ended: it trains, or it was killed and could not say so. Its last line is of {last}"
            f"{_of_all(record)}."
        )
    where = f"at step {state['step']:,}{_of_all(record)}"
    if state["state"] == "stopped":
        return f"The run was stopped by a signal {where} and has saved: {state['how_to_continue']}."
    return f"The run failed {where}: {str(state['error']).rstrip('.')}. To go on: {state['how_to_continue']}."


def _of_all(record: RunRecord) -> str:
    """Return ` of 30`; nothing for a run that was stopped before its number of steps was known."""
    total = record.state["total_steps"]
    return f" of {total:,}" if total is not None else ""


def _without_adjustment(record: RunRecord) -> str:
    """Return why there is none: ranks are fixed, or the first adjustment is still to come."""
    if record.method not in METHODS or not record.state.get("total_steps"):
        return "Ranks were never adjusted: fixed ranks, or no adjustment yet."
    config = METHODS[record.method].config_class.model_validate(record.recipe["method"])
    planned = config.adjustments(record.state["total_steps"]).steps
    if not planned:
        return f"Ranks were never adjusted: {record.method} has fixed ranks."
    return f"No adjustment yet: the first of {len(planned)} is planned after step {planned[0]:,}."


def _span(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return f"{low}" if low == high else f"{low} to {high}"
