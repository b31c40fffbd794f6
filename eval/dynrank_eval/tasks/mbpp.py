"""MBPP (Austin et al. 2021): small Python programs from a sentence; sanitized (427) or full (974)."""

from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.tasks.base import Problem
from dynrank_eval.tasks.code import CodeTask, defined_names, imports, used_names
from dynrank_eval.tasks.sources import file_source, find_file, hub_rows, make_problems

_FILES = ("sanitized-mbpp.jsonl", "sanitized-mbpp.json", "mbpp.jsonl")
_AUSTIN = "You are an expert Python programmer, and here is your task:"
_HUB = "google-research-datasets/mbpp"


class Mbpp(CodeTask):
    """Reads the sanitized or the full file of the data folder, else the hub's sanitized test split (257)."""

    name = "mbpp"
    prompt_is_code = False

    def load(self, data_dir: Path | None) -> list[Problem]:
        path = find_file(data_dir, self.name, _FILES)
        if path is not None:
            return make_problems(path, read_rows(path, ("task_id", "code", "test_list")), _problem)
        rows = hub_rows(self.name, data_dir, _FILES, _HUB, ["sanitized"], "test")
        return make_problems(_HUB, enumerate(rows, start=1), _problem)

    def source(self, data_dir: Path | None) -> dict[str, str]:
        path = find_file(data_dir, self.name, _FILES)
        if path is None:
            return {"hub": _HUB, "variant": "sanitized, test"}
        return file_source(path, "sanitized" if "sanitized" in path.name else "full")


def _problem(row: dict[str, Any]) -> Problem:
    text = row.get("prompt", row.get("text"))
    if text is None:
        raise DataError("the row lacks the key 'prompt' (sanitized) or 'text' (full).")
    # EvalPlus' prompt: the sentence and the first test, which says what the function is called.
    prompt = f'"""\n{text}\n{row["test_list"][0]}\n"""\n'
    tests = "\n".join(row["test_list"][:3])
    austin = f"{_AUSTIN} {text} Your code should pass these tests:\n\n{tests}\n"
    return Problem(str(row["task_id"]), prompt, _reference(row), forms={"austin": austin})


def _reference(row: dict[str, Any]) -> dict[str, Any]:
    # In tasks 367 and 927 of the full set, the set-up builds on the solution's class: it comes after the code.
    setup = row.get("test_setup_code") or ""
    tests = "\n".join([setup, *row["test_list"]])
    prelude = "\n".join(row.get("test_imports") or [])
    # Only what the reference defines is asked of a solution: one that redefines `set` does not reach the tests.
    names = used_names(tests) & defined_names(row["code"])
    return {
        "prelude": imports(row["code"]) + prelude,
        "names": " ".join(sorted(names)),
        "tests": {"tests": tests},
        "solution": row["code"],
    }
