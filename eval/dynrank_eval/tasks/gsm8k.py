"""GSM8K (Cobbe et al. 2021), the 1319 test problems."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.tasks.base import Problem
from dynrank_eval.tasks.numeric import NumericTask, numeric_problems
from dynrank_eval.tasks.sources import file_source, find_file, hub_rows

_HUB = "openai/gsm8k"


class Gsm8k(NumericTask):
    """Reads `test.jsonl` (and for solved examples `train.jsonl`) of the data folder, else the hub's data set."""

    name = "gsm8k"

    def load(self, data_dir: Path | None) -> list[Problem]:
        source, rows = _rows(data_dir, "test")
        return numeric_problems(source, _final_answers(source, rows))

    def source(self, data_dir: Path | None) -> dict[str, str]:
        path = find_file(data_dir, self.name, ["test.jsonl"])
        return {"hub": _HUB, "variant": "test"} if path is None else file_source(path, "test")

    def examples(self, data_dir: Path | None) -> list[dict[str, Any]]:
        return [row for _, row in _rows(data_dir, "train")[1]]


def _rows(data_dir: Path | None, split: str) -> tuple[Path | str, Iterable[tuple[int, dict[str, Any]]]]:
    names = [f"{split}.jsonl"]
    path = find_file(data_dir, "gsm8k", names)
    if path is not None:
        return path, read_rows(path, ("question", "answer"))
    return _HUB, enumerate(hub_rows("gsm8k", data_dir, names, _HUB, ["main"], split), start=1)


def _final_answers(
    source: Path | str, rows: Iterable[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Replace the rows' worked solution by the number after its "####"."""
    for line, row in rows:
        _, found, answer = str(row["answer"]).rpartition("####")
        if not found:
            raise DataError(f'{source}, line {line}: the answer has no final "#### N".')
        yield line, {**row, "answer": answer.strip()}
