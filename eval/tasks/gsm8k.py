"""GSM8K (Cobbe et al. 2021), the 1319 test problems."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.tasks.base import Problem
from dynrank_eval.tasks.numeric import NumericTask, numeric_problems

_HUB = "openai/gsm8k"


class Gsm8k(NumericTask):
    """Reads `test.jsonl` of the data folder, else the hub's data set."""

    name = "gsm8k"

    def load(self, data_dir: Path | None) -> list[Problem]:
        path = data_dir / "test.jsonl" if data_dir else None
        if path is not None and path.is_file():
            return numeric_problems(path, _final_answers(path, read_rows(path, ("question", "answer"))))
        rows = enumerate(_hub_rows(data_dir), start=1)
        return numeric_problems(_HUB, _final_answers(_HUB, rows))


def _final_answers(
    source: Path | str, rows: Iterable[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with the worked solution replaced by the number after its "####"."""
    for line, row in rows:
        _, found, answer = str(row["answer"]).rpartition("####")
        if not found:
            raise DataError(f'{source}, line {line}: the answer has no final "#### N".')
        yield line, {**row, "answer": answer.strip()}


def _hub_rows(data_dir: Path | None) -> list[dict[str, Any]]:
    where = f"{data_dir} has no test.jsonl" if data_dir else "no --data-dir was given"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"gsm8k: {where}, and the package datasets is not installed: {error}.") from error
    try:
        return list(load_dataset(_HUB, "main", split="test"))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"gsm8k: {where}, and {_HUB} could not be fetched from the hub: {first}") from error
