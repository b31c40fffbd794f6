"""Runs model-written programs so that they do no harm and cannot score without passing.

docstring below
"""

from dynrank_eval.sandbox.isolation import Isolation, detect, require_network_isolation
from dynrank_eval.sandbox.limits import Limits, Outcome, Program, Result
from dynrank_eval.sandbox.runner import check, run_programs

__all__ = [
    "Isolation",
    "Limits",
    "Outcome",
    "Program",
    "Result",
    "check",
    "detect",
    "require_network_isolation",
    "run_programs",
]
