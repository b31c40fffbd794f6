"""Two evaluations of the same problems, compared problem by problem."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.statistics import mcnemar_exact, paired_interval, sign_flip_test
from dynrank_eval.tasks import Verdict

# Both must be the same for a comparison to mean anything.
_SHARED = {
    "data_hash": "they hold different problems",
    "protocol": "they were scored by different protocols",
    "samples_per_problem": "they have different numbers of completions per problem",
}


@dataclass(frozen=True)
class Comparison:
    """One task: each problem's share of correct completions in both evaluations.

    Attributes:
        shares: by task id, the first's and the second's share; 0 or 1 where there is one completion per problem.
    """

    task: str
    samples: int
    shares: dict[str, tuple[float, float]]

    @property
    def n(self) -> int:
        """Number of problems."""
        return len(self.shares)

    @property
    def differences(self) -> list[float]:
        """Of each problem the second's share minus the first's."""
        return [second - first for first, second in self.shares.values()]

    @property
    def difference(self) -> float:
        """The second's score minus the first's."""
        return sum(self.differences) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference."""
        return paired_interval(self.differences)

    @property
    def p_value(self) -> float:
        """By McNemar's exact test, or a permutation test of the problems' means for several completions."""
        if self.samples > 1:
            return sign_flip_test(self.differences)
        return mcnemar_exact(len(self.first_higher), len(self.second_higher))

    @property
    def first_higher(self) -> list[str]:
        """Problems with a higher share in the first; for one completion, those that only the first solved."""
        return [task_id for task_id, (first, second) in self.shares.items() if first > second]

    @property
    def second_higher(self) -> list[str]:
        """Problems with a higher share in the second."""
        return [task_id for task_id, (first, second) in self.shares.items() if first < second]

    @property
    def equal(self) -> list[str]:
        """Problems with the same share in both."""
        return [task_id for task_id, (first, second) in self.shares.items() if first == second]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison with every problem's id."""
        common = {
            "n": self.n,
            "samples_per_problem": self.samples,
            "difference": self.difference,
            "interval": list(self.interval),
            "p_value": self.p_value,
            "test": "permutation of problem means" if self.samples > 1 else "McNemar, exact",
        }
        if self.samples > 1:
            return common | {
                "first_higher": self.first_higher,
                "second_higher": self.second_higher,
                "equal": self.equal,
            }
        return common | {
            "both": [task_id for task_id in self.equal if self.shares[task_id][0] == 1],
            "only_first": self.first_higher,
            "only_second": self.second_higher,
            "neither": [task_id for task_id in self.equal if self.shares[task_id][0] == 0],
        }


def compare(first: Path, second: Path) -> list[Comparison]:
    """Compare the tasks that both output folders hold.

    Raises:
        RunError: a folder is no evaluation, or the two differ in problems, protocol or completions per problem.
    """
    results = [_results(folder) for folder in (first, second)]
    shared = [task for task in results[0] if task in results[1]]
    if not shared:
        raise RunError(
            f"{first} and {second} have no task in common: {', '.join(results[0])}; {', '.join(results[1])}."
        )
    for task in shared:
        for key, meaning in _SHARED.items():
            values = [result[task][key] for result in results]
            if values[0] != values[1]:
                raise RunError(
                    f"{first} and {second} cannot be compared on {task}: {meaning}, their {key} differ "
                    f"({values[0]}, {values[1]})."
                )
    verdicts = [_verdicts(folder) for folder in (first, second)]
    return [
        _compare_one(task, results[0][task], verdicts[0][task], verdicts[1][task], (first, second))
        for task in shared
    ]


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["tasks"])
    except OSError as error:
        raise RunError(f"{folder} has no results.json: name the --output of `run` or `score`.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no result of dynrank-eval: {error!r}.") from error


def _verdicts(folder: Path) -> dict[str, dict[str, list[bool]]]:
    """Return per task and problem whether each completion is correct."""
    verdicts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for _, row in read_rows(folder / "samples.jsonl", ("task", "task_id", "verdict")):
        verdicts[str(row["task"])][str(row["task_id"])].append(row["verdict"] == Verdict.CORRECT.value)
    return verdicts


def _compare_one(
    task: str,
    entry: dict[str, Any],
    first: dict[str, list[bool]],
    second: dict[str, list[bool]],
    folders: tuple[Path, Path],
) -> Comparison:
    samples = int(entry["samples_per_problem"])
    if first.keys() != second.keys():
        raise RunError(
            f"the samples.jsonl of {folders[0]} and {folders[1]} hold different problems of {task}."
        )
    for folder, verdicts in zip(folders, (first, second), strict=True):
        if any(len(each) != samples for each in verdicts.values()):
            raise RunError(
                f"{folder}/samples.jsonl does not hold {samples} completions of each problem of {task}."
            )
    shares = {
        task_id: (sum(each) / samples, sum(second[task_id]) / samples) for task_id, each in first.items()
    }
    return Comparison(task, samples, shares)
