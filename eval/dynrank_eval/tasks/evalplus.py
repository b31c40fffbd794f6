"""HumanEval+ and MBPP+ (Liu et al. 2023): the same problems on many more inputs, held against a reference.

EvalPlus' data files are read as they are; its package is not needed. A solution passes when on every input (the
original's and the added) it gives what the reference gives, by EvalPlus' rule of comparison (evalplus_oracle.py).
"""

import os
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.tasks.base import Problem
from dynrank_eval.tasks.code import CodeTask
from dynrank_eval.tasks.evalplus_inputs import mbpp_input
from dynrank_eval.tasks.sources import file_source, find_file, make_problems

_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
_ORACLE = Path(__file__).with_name("evalplus_oracle.py")
# In a namespace of its own: a function to write may be called like one of the oracle's (Mbpp/56's is `check`).
_PRELUDE = """\
from math import inf, nan
_evalplus = {{}}
exec(compile({!r}, "<oracle>", "exec"), _evalplus)
_reference = _evalplus["load"]({!r}, {!r})
"""


class EvalPlusTask(CodeTask):
    """Reads the file that `override` names, else the one in the data folder; the release has no package."""

    files: tuple[str, ...]
    override: str
    release: str

    def load(self, data_dir: Path | None) -> list[Problem]:
        path = self._path(data_dir)
        return make_problems(path, read_rows(path, _KEYS), self._problem)

    def source(self, data_dir: Path | None) -> dict[str, str]:
        path = self._path(data_dir)
        return file_source(path, path.name.partition(".jsonl")[0])

    def _path(self, data_dir: Path | None) -> Path:
        named = os.environ.get(self.override)
        path = Path(named) if named else find_file(data_dir, self.name, self.files)
        if path is None:
            raise DataError(
                f"{self.name} needs EvalPlus' file {self.files[0]} in --data-dir, or its path in {self.override}; "
                f"it is a release of {self.release}."
            )
        return path

    def _problem(self, row: dict[str, Any]) -> Problem:
        if not row["base_input"] and not row["plus_input"]:
            raise DataError(f"{row['task_id']} has no inputs.")
        parts = [
            [self._input(row["task_id"], given) for given in row[key]] for key in ("base_input", "plus_input")
        ]
        entry = row["entry_point"]
        reference = row["prompt"] + row["canonical_solution"]
        settings = f"{self.name!r}, {entry!r}, {float(row['atol'] or 0)!r}"
        # A part with no inputs passes at once: a base alone or a plus alone is a file of its own.
        tests = {
            part: f"_evalplus['check']({entry}, _reference, {inputs!r}, {settings})\n"
            for part, inputs in zip(("base", "plus"), parts, strict=True)
        }
        return Problem(
            str(row["task_id"]),
            row["prompt"].strip() + "\n",
            {
                "prelude": _PRELUDE.format(_ORACLE.read_text(encoding="utf-8"), reference, entry),
                "names": entry,
                "tests": tests,
                "solution": reference,
            },
        )

    def _input(self, task_id: str, given: list[Any]) -> list[Any]:
        """Return the arguments of one call, as the file means them."""
        return given


class HumanEvalPlus(EvalPlusTask):
    name = "humaneval_plus"
    prompt_is_code = True
    files = ("HumanEvalPlus.jsonl", "HumanEvalPlus*.jsonl", "HumanEvalPlus*.jsonl.gz")
    override = "HUMANEVAL_OVERRIDE_PATH"
    release = "github.com/evalplus/humanevalplus_release (v0.1.10: 164 problems)"


class MbppPlus(EvalPlusTask):
    """Its inputs went through JSON, which knows neither tuples, sets nor complex numbers."""

    name = "mbpp_plus"
    prompt_is_code = False
    files = ("MbppPlus.jsonl", "MbppPlus*.jsonl", "MbppPlus*.jsonl.gz")
    override = "MBPP_OVERRIDE_PATH"
    release = "github.com/evalplus/mbppplus_release (v0.2.0: 378 problems)"

    def _input(self, task_id: str, given: list[Any]) -> list[Any]:
        return mbpp_input(int(task_id.rpartition("/")[2]), given)
