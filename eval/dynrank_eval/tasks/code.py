"""What the code benchmarks share: from a completion to a program, and its verdict in the sandbox.

A reference of such a problem holds four sources: `prelude` (what the tests build on), `names` (what they use of the
solution, with spaces between; the asked function last), `tests` (by name), and `solution`, which passes them and whose
time sets the time limit.
"""

import ast
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from dynrank_eval import sandbox
from dynrank_eval.protocols import Protocol
from dynrank_eval.sandbox import Limits, Outcome, Program, Result
from dynrank_eval.sanitizing import sanitize
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict
from dynrank_eval.tasks.programs import program
from dynrank_eval.transcriptions import evalplus, pissa

logger = logging.getLogger(__name__)

_VERDICTS = {
    Outcome.PASSED: Verdict.CORRECT,
    Outcome.FAILED: Verdict.WRONG,
    Outcome.TIMEOUT: Verdict.TIMEOUT,
    Outcome.UNPARSABLE: Verdict.INVALID,
}
# A reference that takes longer than this would raise the limit of 4 s.
_REFERENCE_FACTOR = 4.0
_LONGEST_REFERENCE_SECONDS = 60.0
_BLOCK = re.compile(r"```[ \t]*([^\s`]*)[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_PYTHON = re.compile(r"(?:python|py)[0-9.]*", re.IGNORECASE)
_AFTER_THE_FUNCTION = re.compile(r"^(?:if __name__ ==|# Example usage|assert\b)", re.MULTILINE)


class CodeTask(Task):
    """Judges by running; subclasses load."""

    default_protocol = "dynrank-code-v1"
    # Whether a prompt is the beginning of the program (HumanEval) or only describes it (MBPP).
    prompt_is_code: bool

    def check_machine(self, protocol: Protocol, allow_network: bool) -> None:
        isolation = sandbox.detect()
        if not allow_network:
            sandbox.require_network_isolation(isolation)
        if isolation.missing():
            logger.warning("on this machine the sandbox does not isolate: %s", ", ".join(isolation.missing()))
        sandbox.check()

    def machine(self) -> dict[str, Any]:
        isolation = sandbox.detect()
        return {"sandbox": {**isolation.covers(), "missing": isolation.missing()}}

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[str], protocol: Protocol
    ) -> list[Judgement]:
        codes = [
            self._code(problem, completion, protocol)
            for problem, completion in zip(problems, completions, strict=True)
        ]
        tolerant = protocol.code == "program"
        written = [place for place, code in enumerate(codes) if code]
        programs = [_program(problems[place], codes[place], tolerant) for place in written]
        references = [_program(problems[place], problems[place].reference["solution"]) for place in written]
        results = dict(zip(written, run_within_limits(programs, references), strict=True))
        return [
            self._judgement(problem, code, results.get(place))
            for place, (problem, code) in enumerate(zip(problems, codes, strict=True))
        ]

    def _judgement(self, problem: Problem, code: str, result: Result | None) -> Judgement:
        parts = list(problem.reference["tests"])
        if result is None:
            return Judgement(
                Verdict.INVALID, None, dict.fromkeys(parts, False) if len(parts) > 1 else {}, "tests"
            )
        verdict = _VERDICTS[result.outcome]
        passed = len(parts) if verdict is Verdict.CORRECT else result.passed_tests
        # Plus means base and plus, as in EvalPlus: a part counts where all before it passed as well.
        grades = {part: place < passed for place, part in enumerate(parts)} if len(parts) > 1 else {}
        return Judgement(verdict, code, grades, "tests")

    def _code(self, problem: Problem, completion: str, protocol: Protocol) -> str:
        """Return the whole program; empty where the completion holds none."""
        assert protocol.code is not None, f"{protocol.name} asks for no code"
        begun = problem.forms.get(protocol.form or "", problem.text) if self.prompt_is_code else ""
        if isinstance(completion, WholeProgram):
            return program("", completion, _names(problem)) if protocol.code == "program" else str(completion)
        text = protocol.cut(completion)
        return _PROGRAMS[protocol.code](problem, begun, text) if text.strip() else ""


class WholeProgram(str):
    """A completion that is a whole program, as under EvalPlus' key `solution`: no prompt belongs before it."""


def _program(problem: Problem, solution: str, tolerant: bool = False) -> Program:
    reference = problem.reference
    tests = tuple(reference["tests"].values())
    return Program(solution, tests, tuple(reference["names"].split()), reference["prelude"], tolerant)


def _with_prompt(problem: Problem, begun: str, text: str) -> str:
    """Return prompt and continuation as EvalPlus joins them; its engines expand tabs too."""
    return sanitize(begun, text.replace("\t", "    "), _names(problem))


_PROGRAMS: dict[str, Callable[[Problem, str, str], str]] = {
    "program": lambda problem, begun, text: program(begun, text, _names(problem)),
    "continuation": _with_prompt,
    "block": lambda problem, begun, text: begun + first_block(text),
    "verbatim": lambda problem, begun, text: begun + text,
    "pissa": lambda problem, begun, text: begun + pissa.code(text),
    "evalplus_base": lambda problem, begun, text: evalplus.sanitize(
        problem.text + text.replace("\t", "    "), _names(problem)
    ),
    "evalplus_chat": lambda problem, begun, text: evalplus.sanitize(
        text.replace("\t", "    "), _names(problem)
    ),
}


def _names(problem: Problem) -> list[str]:
    return str(problem.reference["names"]).split()


def first_block(completion: str) -> str:
    """Return the first fenced block of Python, else the first of no language, else the whole text.

    Up to what only tries the function out.
    """
    blocks = _BLOCK.findall(completion)
    python = [code for language, code in blocks if _PYTHON.fullmatch(language)]
    code = [*python, *(code for language, code in blocks if not language), completion][0]
    end = _AFTER_THE_FUNCTION.search(code)
    return code[: end.start()] if end else code


def run_within_limits(programs: Sequence[Program], references: Sequence[Program]) -> list[Result]:
    """Return results under the limit max(4 s, 4 x the reference's time).

    The references of programs that pass or fail within 4 s need not run: only a program that is stopped there has
    its reference timed, and runs again under its own limit, which also spares it a moment of load. A reference that
    does not pass within a minute allows 4 s.
    """
    results = sandbox.run_programs(programs)
    late = [place for place, result in enumerate(results) if result.outcome is Outcome.TIMEOUT]
    timed = list(dict.fromkeys(references[place] for place in late))
    patient = Limits(wall_seconds=_LONGEST_REFERENCE_SECONDS)
    seconds = {
        reference: result.seconds
        for reference, result in zip(timed, sandbox.run_programs(timed, patient), strict=True)
        if result.outcome is Outcome.PASSED
    }
    allowed = [_REFERENCE_FACTOR * seconds.get(references[place], 0.0) for place in late]
    limits = [Limits(wall_seconds=max(Limits().wall_seconds, longer)) for longer in allowed]
    for place, result in zip(late, sandbox.run_programs([programs[p] for p in late], limits), strict=True):
        results[place] = result
    return results


def defined_names(source: str) -> set[str]:
    """Return what a module's top level defines: functions, classes and assigned names."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {
                part.id
                for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return names


def used_names(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def imports(source: str) -> str:
    """Return the import statements of a module's top level."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(ast.unparse(node) + "\n" for node in nodes)
