"""math-verify in processes of its own, each with a hard deadline.

Symbolic comparison can run for ever (`2003^{2002^{2001}}`), and math-verify's own limit is SIGALRM, which works only
in a main thread. So each worker is a process that answers one question at a time and is killed when it is late.
"""

import json
import queue
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec

from tqdm import tqdm

from dynrank_ds.errors import MachineError
from dynrank_eval.cpus import usable_cpus

DEADLINE_SECONDS = 10.0
# Importing sympy takes seconds on a busy machine: not the answer's time.
_STARTUP_SECONDS = 120.0
_MEMORY_BYTES = 4 << 30
_INSTALL = "`pip install math-verify[antlr4_11_0]==0.9.0`"


class Equality(Enum):
    EQUAL = "equal"
    DIFFERENT = "different"
    TIMEOUT = "timeout"


def check(by_sympy: bool = False) -> None:
    """Raise MachineError where math-verify is not installed, or not with the antlr that sympy's parser needs."""
    if find_spec("math_verify") is None:
        raise MachineError(f"the math task needs the package math-verify: {_INSTALL}.")
    antlr = version("antlr4-python3-runtime")
    if by_sympy and not antlr.startswith("4.11."):
        raise MachineError(
            f"this protocol reads answers by sympy, which needs antlr 4.11, not {antlr}: {_INSTALL}."
        )


def compare(
    pairs: Sequence[tuple[str, str]], deadline: float | None = None, by: str = "math_verify"
) -> list[Equality]:
    """Return for each (gold, answer) whether the answer has the gold's value.

    Args:
        deadline: seconds for a pair; 10 where None.
        by: "math_verify", which gets both as `$...$`, since it often does not recognise bare LaTeX; or "sympy", as
            in lm-eval's minerva_math: what sympy's parser reads differs by 0, found within 5 s.
    """
    if not pairs:
        return []
    workers = max(1, min(usable_cpus(), len(pairs) // 20 + 1))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    everyone = [_Worker(deadline or DEADLINE_SECONDS, by) for _ in range(workers)]
    for worker in everyone:
        idle.put(worker)

    def ask(pair: tuple[str, str]) -> Equality:
        worker = idle.get()
        try:
            return worker.ask(*pair)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(tqdm(pool.map(ask, pairs), "math-verify", len(pairs), unit="answer", disable=None))
    finally:
        for worker in everyone:
            worker.stop()


class _Worker:
    """A process that compares; started at the first question, and anew after one that it did not survive."""

    def __init__(self, deadline: float, by: str) -> None:
        self._deadline, self._by = deadline, by
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str) -> Equality:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        self._process.stdin.flush()
        line = self._line(self._deadline)
        if line is None or line == b"":
            # Late, or killed by its memory limit: no answer in the means it was given.
            self.stop()
            return Equality.TIMEOUT
        return Equality(line.decode().strip())

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(_MEMORY_BYTES), self._by],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._line(_STARTUP_SECONDS) != b"ready\n":
            self.stop()
            raise MachineError("math-verify does not start: try `python -c 'import math_verify'`.")

    def _line(self, seconds: float) -> bytes | None:
        assert self._process is not None and self._process.stdout is not None
        # One short line per question: when anything is there, readline has all of it.
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_SCRIPT = """
import json, logging, os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
import signal
import sympy
from sympy.parsing.latex import parse_latex

def late(*_):
    raise TimeoutError

signal.signal(signal.SIGALRM, late)

def difference_is_zero(gold, answer):
    # lm-eval catches every exception of the parser and of sympy as well, and counts it as different.
    signal.alarm(5)
    try:
        return bool(sympy.simplify(parse_latex(answer) - parse_latex(gold)) == 0)
    except ImportError:
        raise
    except Exception:
        return False
    finally:
        signal.alarm(0)

# What the libraries print must not look like an answer.
output = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
# The first question loads the parsers, seconds on a busy machine: not the first answer's time either.
if sys.argv[2] == "sympy":
    parse_latex("\\\\frac{1}{2}")
warm = [parse("$\\\\left( 3, \\\\frac{\\\\pi}{2} \\\\right)$", parsing_timeout=None) for _ in range(2)]
verify(*warm, timeout_seconds=None)
output.write("ready\\n")
for line in sys.stdin:
    pair = json.loads(line)
    if sys.argv[2] == "sympy":
        equal = (pair[0] == pair[1] != "") or difference_is_zero(*pair)
    else:
        gold, answer = (parse(f"${text}$", parsing_timeout=None) for text in pair)
        equal = bool(gold) and bool(answer) and verify(gold, answer, timeout_seconds=None)
    output.write(("equal" if equal else "different") + "\\n")
"""
