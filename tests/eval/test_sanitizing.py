"""What is kept of a generated program: EvalPlus' sanitizer, by Python's own parser."""

import ast
import time

import pytest

from dynrank_eval.sanitizing import sanitize
from dynrank_eval.tasks import get_task

PROMPT = 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Their sum."""\n'
BODY = "    result = 0\n    for number in numbers:\n        result += number\n    return result\n"
PROGRAM = PROMPT + BODY
HELPED = (
    "    return add_all(numbers)\n\n\ndef add_all(numbers):\n    return sum(numbers) + ZERO\n\n\nZERO = 0\n"
)

# What comes after (or instead of) the body. EvalPlus 0.3.1 keeps the same of each.
RESCUED = {
    "nothing more": BODY,
    "a fence and prose": BODY + "```\nThis adds them up: it's simple.",
    "prose": BODY + "\nExplanation:\nThe code above is right.\n",
    "a main program": BODY + "\nif __name__ == '__main__':\n    print(total([1]))\n",
    "calls": BODY + "\nprint(total([1]))\ninput()\n",
    "a function that was cut off": BODY + "\n\ndef other(x):\n    if x > (1 +",
    "a class that was cut off": BODY + "\n\nclass Other:\n    def",
    "a helper that is not used": BODY + "\n\ndef unused(x):\n    return x\n",
    "a test": BODY + "\n\ndef test():\n    assert total([1]) == 1\n\ntest()\n",
    "the same function once more": BODY + "\n\ndef total(numbers):\n    return 0\n",
    "a loop that tries it": BODY + "\nfor n in range(3):\n    print(total([n]))\n",
}
KEPT = {
    "used helpers and constants": (HELPED, PROMPT + HELPED),
    "the whole program behind the stub": ("    pass\n\n\n" + PROGRAM, PROGRAM + "from typing import List\n"),
    "the whole program in a fence": (f"Sure!\n```python\n{PROGRAM}```\n", PROGRAM),
    "imports, first": (BODY + "import math\n", "import math\n" + PROGRAM),
}
# EvalPlus drops these: it looks for plain definitions with a return and for assignments to one name.
KEPT_HERE_ONLY = {
    "a decorated helper": (
        "    return add(tuple(numbers))\n\n\nfrom functools import cache\n\n\n"
        "@cache\ndef add(numbers):\n    return sum(numbers)\n"
    ),
    "a helper that returns nothing": (
        "    put(numbers)\n    return numbers[0]\n\n\ndef put(numbers):\n    numbers[:] = [sum(numbers)]\n"
    ),
    "two names at once": "    return sum(numbers) + ZERO\n\n\nZERO, ONE = 0, 1\n",
}


def statements(program: str) -> list[str]:
    return sorted(ast.dump(node) for node in ast.parse(program).body)


def works(program: str) -> bool:
    namespace: dict[str, object] = {}
    exec(program, namespace)
    return namespace["total"]([1, 2, 4]) == 7  # type: ignore[operator]


@pytest.mark.parametrize("completion", RESCUED.values(), ids=RESCUED)
def test_the_function_is_kept_and_what_surrounds_it_is_not(completion: str) -> None:
    kept = sanitize(PROMPT, completion, ["total"])
    assert statements(kept) == statements(PROGRAM) and works(kept)


@pytest.mark.parametrize(("completion", "expected"), KEPT.values(), ids=KEPT)
def test_all_that_the_function_needs_is_kept(completion: str, expected: str) -> None:
    kept = sanitize(PROMPT, completion, ["total"])
    assert statements(kept) == statements(expected) and works(kept)


@pytest.mark.parametrize("completion", KEPT_HERE_ONLY.values(), ids=KEPT_HERE_ONLY)
def test_a_program_that_was_right_stays_right(completion: str) -> None:
    assert works(PROMPT + completion) and works(sanitize(PROMPT, completion, ["total"]))


@pytest.mark.parametrize(
    "completion", ["I cannot do that.", "    return (\n", "```\n", "\0", "\ud800", "  x = 1\n x", ""]
)
def test_a_completion_that_adds_no_line_is_no_program(completion: str) -> None:
    assert sanitize(PROMPT, completion, ["total"]) == ""


def test_a_program_without_what_is_asked_for_is_none() -> None:
    assert sanitize("", "import math\ndef other(x):\n    return x\n", ["total"]) == ""
    assert (
        sanitize("", "def other(x):\n    return x\n", ["total", "other"]) == "def other(x):\n    return x\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "-" * 100_000 + "1",
        "a" + ".b" * 50_000,
        "x = (\n" * 20_000,
        "if x:\n" * 20_000,
        "prose that is no Python\n" * 20_000,
        "def f():\n    return 1\n" * 20_000,
        "'''\n" * 20_001,
        "    # " + "x" * 1_000_000,
    ],
    ids=lambda text: text[:12].strip(),
)
def test_long_and_deep_texts_take_seconds_at_most(text: str) -> None:
    start = time.process_time()
    sanitize(PROMPT, text, ["total"])
    assert time.process_time() - start < 10


def test_evalplus_keeps_the_same() -> None:
    """The package itself, where it is installed, on HumanEval's first problems; else the shapes above stand for it."""
    theirs = pytest.importorskip("evalplus.sanitize", reason="evalplus is not installed").sanitize
    for completion in [*RESCUED.values(), *(completion for completion, _ in KEPT.values())]:
        kept = sanitize(PROMPT, completion, ["total"])
        assert statements(kept) == statements(theirs(PROMPT + completion, "total"))
    for problem in get_task("humaneval").load(None)[::20]:
        entry = problem.reference["names"]
        body = problem.reference["solution"].removeprefix(problem.reference["prelude"])
        for shape in RESCUED.values():
            completion = shape.replace(BODY, body.rstrip("\n") + "\n").replace("total", entry)
            kept = sanitize(problem.text, completion, [entry])
            assert statements(kept) == statements(theirs(problem.text + completion, entry))
