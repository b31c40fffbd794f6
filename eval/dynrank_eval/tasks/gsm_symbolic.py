"""GSM-Symbolic (Mirzadeh et al. 2024): grade-school templates with drawn names and numbers.

The problems are made beside the training data, so they are always read from a folder:
`<task name>.jsonl` with rows of task_id, question and answer.
"""

from pathlib import Path

from dynrank_ds.errors import DataError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.tasks.base import Problem
from dynrank_eval.tasks.numeric import NumericTask, numeric_problems
from dynrank_eval.tasks.sources import file_source, find_file


class GsmSymbolic(NumericTask):
    """New draws of the templates that were trained on."""

    name = "gsm_symbolic"

    def load(self, data_dir: Path | None) -> list[Problem]:
        if data_dir is None:
            raise DataError(f"--task {self.name} needs --data-dir with the file {self.name}.jsonl in it.")
        path = find_file(data_dir, self.name, [f"{self.name}.jsonl"]) or data_dir / f"{self.name}.jsonl"
        return numeric_problems(path, read_rows(path, ("task_id", "question", "answer")))

    def source(self, data_dir: Path | None) -> dict[str, str]:
        path = find_file(data_dir, self.name, [f"{self.name}.jsonl"])
        return {} if path is None else file_source(path, self.name)


class GsmSymbolicUnseen(GsmSymbolic):
    """Templates never trained on."""

    name = "gsm_symbolic_unseen"
