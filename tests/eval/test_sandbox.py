"""What the sandbox promises, asked by programs that try."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from dynrank_eval import sandbox
from dynrank_eval.sandbox import Limits, Outcome

SHORT = Limits(wall_seconds=1.0)


def outcome(program: str, limits: Limits = SHORT) -> Outcome:
    return sandbox.run_programs([[program]], limits)[0]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sandbox makes its directories."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def processes_with(argument: str) -> list[str]:
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in command.read_bytes():
                found.append(command.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_machine_can_run_programs() -> None:
    sandbox.check()
    assert outcome("assert 1 + 1 == 2") is Outcome.PASSED
    assert outcome("assert 1 + 1 == 3") is Outcome.FAILED
    assert outcome("def f(:") is Outcome.UNPARSABLE


@pytest.mark.parametrize(
    "program",
    [
        "exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print('passed')\nraise SystemExit(0)",
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'passed\\n')\n  except OSError: pass\nos._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "import atexit\natexit.register(print, 'passed')\nraise SystemExit",
        "def f(): return f()\nf()",
    ],
)
def test_leaving_early_does_not_pass(program: str) -> None:
    tests = "raise AssertionError('the tests must fail')"
    assert sandbox.run_programs([[program, tests]], SHORT) == [Outcome.FAILED]


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(8 << 30)",
        "open('big', 'wb').write(bytes(32 << 20))",
        "files = [open('f', 'w') for _ in range(100)]",
        "input()",
    ],
)
def test_asking_for_too_much_fails(program: str) -> None:
    assert outcome(program, Limits()) is Outcome.FAILED


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time\ntime.sleep(60)", "while True: print('x' * 9999)"]
)
def test_timeout_stops_it(program: str, temporary: Path) -> None:
    start = time.monotonic()
    assert outcome(program) is Outcome.TIMEOUT
    assert time.monotonic() - start < 10
    assert list(temporary.iterdir()) == []


def test_ignored_signals_do_not_help() -> None:
    program = """
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    pass
"""
    assert outcome(program) is Outcome.TIMEOUT


def test_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "s3cret")
    # Python itself sets LC_CTYPE where the environment names no locale (PEP 538).
    assert outcome("import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ") is Outcome.PASSED


def test_working_directory_is_private_writable_and_gone_afterwards(temporary: Path) -> None:
    assert (
        outcome("import os\nassert os.listdir() == []\nopen('a', 'w').write('b')\nos.mkdir('c')")
        is Outcome.PASSED
    )
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("ending", ["", "while True: pass", "os._exit(0)"])
def test_children_do_not_outlive_it(ending: str, temporary: Path) -> None:
    mark = f"4321.{os.getpid()}"
    program = f"import os\nif os.fork() == 0: os.execv('/bin/sleep', ['sleep', '{mark}'])\n{ending}"
    outcome(program)
    assert processes_with(mark) == []
    assert list(temporary.iterdir()) == []


def test_the_number_of_processes_is_limited() -> None:
    program = "import os, time\nfor _ in range(500):\n  if os.fork() == 0: time.sleep(60)"
    assert outcome(program, Limits(wall_seconds=4.0)) is Outcome.FAILED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")
def test_started_as_root_it_runs_as_nobody_of_importance() -> None:
    program = """
import os
assert os.getresuid() == (os.getuid(),) * 3 and os.getuid() > 60000, os.getresuid()
assert os.getresgid() == (os.getgid(),) * 3 and os.getgid() > 60000 and os.getgroups() == []
try:
    os.setuid(0)
except PermissionError:
    pass
else:
    raise AssertionError
"""
    assert outcome(program) is Outcome.PASSED


def test_standard_library_and_installed_packages_are_there() -> None:
    assert outcome("import collections.abc, encodings.idna, json.tool, sqlite3, yaml") is Outcome.PASSED


def test_outcomes_keep_the_order_of_the_programs() -> None:
    programs = [["pass"], ["exit()"], ["def"], ["import time; time.sleep(0.3)"], ["1/0"]]
    expected = [Outcome.PASSED, Outcome.FAILED, Outcome.UNPARSABLE, Outcome.PASSED, Outcome.FAILED]
    assert sandbox.run_programs(programs, SHORT) == expected
    assert sandbox.run_programs([]) == []
