"""Two evaluations of the same problems, problem by problem."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.statistics import mcnemar_exact, paired_interval
from dynrank_eval.tasks import Verdict


@dataclass(frozen=True)
class Comparison:
    """One task: which problems each run solved (with several samples: at least half of them).

    `difference` is the second's share minus the first's.
    """

    task: str
    samples: int
    """Per problem, in the run that has more."""
    both: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    neither: tuple[str, ...]

    @property
    def n(self) -> int:
        return len(self.both) + len(self.only_first) + len(self.only_second) + len(self.neither)

    @property
    def difference(self) -> float:
        return (len(self.only_second) - len(self.only_first)) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return paired_interval(len(self.only_first), len(self.only_second), self.n)

    @property
    def p_value(self) -> float:
        return mcnemar_exact(len(self.only_first), len(self.only_second))

    def as_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "difference": self.difference,
            "interval": list(self.interval),
            "p_value": self.p_value,
            "both": self.both,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "neither": self.neither,
        }


def compare(first: Path, second: Path) -> list[Comparison]:
    """Compares the tasks that both output folders hold.

    Raises:
        RunError: a folder is no evaluation, or the two asked other problems or judged by another protocol.
    """
    results = [_results(folder) for folder in (first, second)]
    shared = [task for task in results[0] if task in results[1]]
    if not shared:
        raise RunError(
            f"{first} and {second} have no task in common: {', '.join(results[0])}; {', '.join(results[1])}."
        )
    for task in shared:
        for key in ("data_hash", "protocol"):
            values = [result[task][key] for result in results]
            if values[0] != values[1]:
                raise RunError(
                    f"{first} and {second} cannot be compared on {task}: their {key} differ "
                    f"({values[0]}, {values[1]})."
                )
    verdicts = [_solved(folder) for folder in (first, second)]
    for task in shared:
        if verdicts[0][task].keys() != verdicts[1][task].keys():
            raise RunError(f"the samples.jsonl of {first} and {second} hold other problems of {task}.")
    samples = {task: max(result[task]["samples_per_problem"] for result in results) for task in shared}
    return [_compare_one(task, samples[task], verdicts[0][task], verdicts[1][task]) for task in shared]


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["tasks"])
    except OSError as error:
        raise RunError(f"{folder} has no results.json: name the --output of `run` or `score`.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no result of dynrank-eval: {error!r}.") from error


def _solved(folder: Path) -> dict[str, dict[str, bool]]:
    """Per task, whether each problem was solved."""
    verdicts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for _, row in read_rows(folder / "samples.jsonl", ("task", "task_id", "verdict")):
        verdicts[str(row["task"])][str(row["task_id"])].append(row["verdict"] == Verdict.CORRECT.value)
    solved = {
        task: {task_id: 2 * sum(each) >= len(each) for task_id, each in problems.items()}
        for task, problems in verdicts.items()
    }
    return defaultdict(dict, solved)


def _compare_one(task: str, samples: int, first: dict[str, bool], second: dict[str, bool]) -> Comparison:
    def where(a: bool, b: bool) -> tuple[str, ...]:
        return tuple(task_id for task_id in first if (first[task_id], second[task_id]) == (a, b))

    pairs = [(True, True), (True, False), (False, True), (False, False)]
    return Comparison(task, samples, *(where(a, b) for a, b in pairs))
