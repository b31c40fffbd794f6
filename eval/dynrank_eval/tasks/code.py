"""What the code benchmarks share: from a completion to a program, and its verdict in the sandbox.

A reference of such a problem holds four sources: `prelude` (what the tests build on), `names` (what they use of the
solution, with spaces between), `tests`, and `solution`, which passes them and whose time sets the time limit.
"""

import ast
import logging
import re
from collections.abc import Sequence
from typing import Any

from dynrank_eval import sandbox
from dynrank_eval.protocols import Protocol
from dynrank_eval.sandbox import Limits, Outcome, Program
from dynrank_eval.tasks.base import Judgement, Problem, Task, Verdict
from dynrank_eval.tasks.sanitizing import sanitize

log = logging.getLogger(__name__)

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

    default_protocol = "evalplus-v1"
    # Whether a prompt is the beginning of the program (HumanEval) or only describes it (MBPP).
    prompt_is_code: bool

    def check_machine(self, allow_network: bool) -> None:
        isolation = sandbox.detect()
        if not allow_network:
            sandbox.require_network_isolation(isolation)
        if isolation.missing():
            log.warning("on this machine the sandbox does not isolate: %s", ", ".join(isolation.missing()))
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
        written = [place for place, code in enumerate(codes) if code]
        programs = [_program(problems[place], codes[place]) for place in written]
        references = [_program(problems[place], problems[place].reference["solution"]) for place in written]
        outcomes = dict(zip(written, run_within_limits(programs, references), strict=True))
        return [
            Judgement(_VERDICTS[outcomes[place]], code)
            if place in outcomes
            else Judgement(Verdict.INVALID, None)
            for place, code in enumerate(codes)
        ]

    def _code(self, problem: Problem, completion: str, protocol: Protocol) -> str:
        """The whole program; empty where the completion holds none."""
        text = protocol.cut(completion)
        if not text.strip():
            return ""
        begun = problem.text if self.prompt_is_code else ""
        if protocol.code == "continuation":
            # EvalPlus' engines expand tabs too; prompts are indented with spaces.
            return sanitize(begun, text.replace("\t", "    "), problem.reference["names"].split())
        return begun + first_block(text)


def _program(problem: Problem, solution: str) -> Program:
    reference = problem.reference
    return Program(solution, (reference["tests"],), tuple(reference["names"].split()), reference["prelude"])


def first_block(completion: str) -> str:
    """The first fenced block of Python, else the first of no language, else the whole text.

    Up to what only tries the function out.
    """
    blocks = _BLOCK.findall(completion)
    python = [code for language, code in blocks if _PYTHON.fullmatch(language)]
    code = [*python, *(code for language, code in blocks if not language), completion][0]
    end = _AFTER_THE_FUNCTION.search(code)
    return code[: end.start()] if end else code


def run_within_limits(programs: Sequence[Program], references: Sequence[Program]) -> list[Outcome]:
    """Outcomes under the limit max(4 s, 4 x the reference's time).

    The references of programs that pass or fail within 4 s need not run: only a program that is stopped there has
    its reference timed, and runs again under its own limit, which also spares it a moment of load. A reference that
    does not pass within a minute allows 4 s.
    """
    outcomes = [result.outcome for result in sandbox.run_programs(programs)]
    late = [place for place, outcome in enumerate(outcomes) if outcome is Outcome.TIMEOUT]
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
        outcomes[place] = result.outcome
    return outcomes


def defined_names(source: str) -> set[str]:
    """What a module's top level defines: functions, classes and assigned names."""
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
    """The import statements of a module's top level."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(ast.unparse(node) + "\n" for node in nodes)
