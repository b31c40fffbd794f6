"""The benchmarks by name."""

from collections.abc import Sequence

from dynrank_ds.errors import RecipeError
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict, fingerprint
from dynrank_eval.tasks.evalplus import HumanEvalPlus, MbppPlus
from dynrank_eval.tasks.gsm8k import Gsm8k
from dynrank_eval.tasks.gsm_symbolic import GsmSymbolic, GsmSymbolicUnseen
from dynrank_eval.tasks.humaneval import HumanEval
from dynrank_eval.tasks.math import Math
from dynrank_eval.tasks.mbpp import Mbpp

__all__ = [
    "TASKS",
    "Judgement",
    "Problem",
    "Task",
    "Verdict",
    "fingerprint",
    "get_task",
    "get_tasks",
    "task_name",
]

_ALL = (GsmSymbolic(), GsmSymbolicUnseen(), Gsm8k(), Math(), HumanEval(), HumanEvalPlus(), Mbpp(), MbppPlus())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_name(written: str) -> str:
    """Return a task's name as it may be written: HumanEval+ and humaneval-plus are humaneval_plus."""
    return written.strip().lower().replace("+", "_plus").replace("-", "_")


def get_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, in any case; RecipeError naming all that do not exist."""
    unknown = [name for name in names if task_name(name) not in TASKS]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise RecipeError(f"--task {listed}: there is no such task; known are {', '.join(TASKS)}.")
    return [TASKS[task_name(name)] for name in names]


def get_task(name: str) -> Task:
    """Return the task called `name`; RecipeError where there is none."""
    return get_tasks([name])[0]
