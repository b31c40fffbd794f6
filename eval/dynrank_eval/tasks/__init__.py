"""The benchmarks by name."""

from dynrank_ds.errors import RecipeError
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict, fingerprint
from dynrank_eval.tasks.evalplus import HumanEvalPlus, MbppPlus
from dynrank_eval.tasks.gsm8k import Gsm8k
from dynrank_eval.tasks.gsm_symbolic import GsmSymbolic, GsmSymbolicUnseen
from dynrank_eval.tasks.humaneval import HumanEval
from dynrank_eval.tasks.math import Math
from dynrank_eval.tasks.mbpp import Mbpp

__all__ = ["TASKS", "Judgement", "Problem", "Task", "Verdict", "fingerprint", "get_task"]

_ALL = (GsmSymbolic(), GsmSymbolicUnseen(), Gsm8k(), Math(), HumanEval(), HumanEvalPlus(), Mbpp(), MbppPlus())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """The task called `name`; RecipeError where there is none."""
    if name not in TASKS:
        raise RecipeError(f"--task {name!r}: there is no such task; known are {', '.join(TASKS)}.")
    return TASKS[name]
