"""Mutated completions: every one gets a verdict, in time."""

import random
import time

import pytest

from dynrank_eval import verification
from dynrank_eval.protocols import load_protocol
from dynrank_eval.tasks import Judgement, Problem, Verdict, get_task

SEEDS = [
    ("18", "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18\nThe answer is: 18"),
    ("1,234", "so 1,234 or 12,34 or $1,234.00\nThe answer is: $1,234.00."),
    (
        "\\frac{3}{4}",
        "We get $\\frac{3}{4} = 0.75$, so $\\boxed{\\frac{3}{4}}$.\nThe answer is: $\\frac{3}{4}$",
    ),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "The answer is: \\left( 3, \\frac{\\pi}{2} \\right)"),
    ("x^2+1", "\\[x^2 + 1 \\le \\sqrt{2^{10}}\\]\nThe answer is: \\boxed{x^2+1}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "The answer is: \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}"),
    ("[1,2)\\cup(3,\\infty)", "The answer is: [1,2)\\cup(3,\\infty)"),
    ("6", "def f(x):\n    return 6\n```python\nprint(6)\n``` The answer is: 6 apples, 50%"),
]
PIECES = [
    "{",
    "}",
    "$",
    "$$",
    "\\",
    "\\frac",
    "\\sqrt",
    "\\boxed{",
    "\\text{",
    "\\left(",
    "\\begin{",
    "\\end{",
    "^{",
    "_",
    "^",
    "!",
    "9999999999",
    "2^{2^{2^{9}}}",
    "0/0",
    "1e999",
    "inf",
    "nan",
    "\u2212",
    "",
    "\u2028",
    "�",
    "\x00",
    "é",
    "数",
    "\U0001d7d9",
    "٣",
    "The",
    "answer",
    "is:",
    "####",
    ",",
    ".",
    "..",
    "--",
    "+-",
    ";",
    "=",
    "\\infty",
    "\\int_0^1",
    "\\sum_{n=1}^{10^9}",
    "\\sin(",
    "x!",
    "'",
    '"',
    "#",
    "%",
    "&",
    "~",
]


def mutated(text: str, draw: random.Random) -> str:
    """Between one and six pieces put in, cut out, doubled, moved or repeated."""
    for _ in range(draw.randint(1, 6)):
        start, end = sorted(draw.choices(range(len(text) + 1), k=2))
        kind = draw.randrange(5)
        if kind == 0:
            text = text[:start] + draw.choice(PIECES) + text[start:]
        elif kind == 1:
            text = text[:start] + text[min(end, start + 8) :]
        elif kind == 2:
            text = text[:end] + text[start:]
        elif kind == 3:
            text = text[end:] + text[:start]
        else:
            text = text[:start] + draw.choice(PIECES) * draw.choice([3, 50, 2000]) + text[start:]
    return text


def completions(how_many: int, seed: int) -> tuple[list[Problem], list[str]]:
    print(f"fuzz seed {seed}")
    draw = random.Random(seed)
    chosen = draw.choices(SEEDS, k=how_many)
    problems = [Problem(str(n), "?", {"answer": gold}) for n, (gold, _) in enumerate(chosen)]
    return problems, [mutated(text, draw) for _, text in chosen]


def assert_judged(judgements: list[Judgement], how_many: int) -> None:
    assert len(judgements) == how_many
    assert {judgement.verdict for judgement in judgements} >= {
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.INVALID,
    }


@pytest.mark.parametrize("protocol", ["metamath-v1", "chat-v1", "pissa-v1", "lm-eval-gsm8k-5shot-v1"])
def test_ten_thousand_completions_of_word_problems(protocol: str) -> None:
    problems, texts = completions(10_000, seed=0)
    problems = [Problem(p.task_id, p.text, {"answer": "6"}) for p in problems]
    start = time.monotonic()
    assert_judged(get_task("gsm8k").judge(problems, texts, load_protocol(protocol, "gsm8k")), 10_000)
    assert time.monotonic() - start < 60


def judge_math(how_many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    deadline = 2.0
    monkeypatch.setattr(verification, "DEADLINE_SECONDS", deadline)
    problems, texts = completions(how_many, seed=1)
    start = time.monotonic()
    judgements = get_task("math").judge(problems, texts, load_protocol("metamath-v1", "math"))
    assert_judged(judgements, how_many)
    late = sum(judgement.verdict is Verdict.TIMEOUT for judgement in judgements)
    print(f"{how_many} completions in {time.monotonic() - start:.0f} s, {late} late")


def test_completions_of_math_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_math(300, monkeypatch)


@pytest.mark.slow
def test_ten_thousand_completions_of_math_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_math(10_000, monkeypatch)
