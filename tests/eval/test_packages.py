"""Our transcriptions against the packages themselves, each installed into an environment of its own."""

import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dynrank_eval.tasks import get_task
from dynrank_eval.transcriptions import evalplus, lm_eval, metamath

pytestmark = pytest.mark.slow
# What is imported on the way to the functions in question, beside what this environment has.
LM_EVAL = [
    "lm_eval==0.4.13",
    "evaluate",
    "sacrebleu",
    "rouge-score",
    "sqlitedict",
    "pytablewriter",
    "more_itertools",
]
LM_EVAL += [
    "word2number",
    "zstandard",
    "jsonlines",
    "tqdm-multiprocess",
    "numexpr",
    "absl-py",
    "nltk",
    "typepy",
]
LM_EVAL += [
    "dataproperty",
    "tcolorpy",
    "tabledata",
    "mbstrdecoder",
    "pathvalidate",
    "portalocker",
    "colorama",
    "lxml",
]
EVALPLUS = [
    "evalplus==0.3.1",
    "tree_sitter",
    "tree_sitter_python",
    "termcolor",
    "wget",
    "appdirs",
    "fire",
    "tempdir",
]


def ask(packages: list[str], folder: Path, script: str, question: Any) -> Any:
    """Install `packages` into `folder` and return what `script` answers to `question`, both as JSON."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    if subprocess.run(install, capture_output=True).returncode != 0:
        pytest.skip(f"pip cannot install {packages[0]}: PyPI is out of reach")
    asked = folder / "question.json"
    asked.write_text(json.dumps(question))
    done = subprocess.run(
        [sys.executable, "-c", script, str(asked)],
        env={**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


PIECES = [
    "#### ",
    "####",
    "The answer is ",
    "The answer is: ",
    "$",
    ",",
    ".",
    "-",
    "%",
    "/",
    " ",
    "\n",
    "A",
    "a lot",
    "=",
]


def replies(how_many: int) -> list[tuple[str, str]]:
    """Perturbed answers with their references; seed 0."""
    draw = random.Random(0)
    made = []
    for _ in range(how_many):
        gold = draw.choice(["18", "1,234", "-3", "0.5", "72000"])
        words = [draw.choice([*PIECES, gold, gold, str(draw.randint(0, 2000))]) for _ in range(8)]
        made.append((gold, "So " + "".join(words)))
    return made


def test_lm_evals_filters_and_metric(tmp_path: Path) -> None:
    given = replies(5000)
    script = """
import json, sys
from lm_eval.filters.extraction import RegexFilter
from lm_eval.api.metrics import exact_match_hf_evaluate
rows = []
ways = [(r"#### (\\-?[0-9\\.\\,]+)", 0), (r"The answer is (\\-?[0-9\\.\\,]+).", 0)]
ways.append((r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1))
filters = [RegexFilter(pattern, select) for pattern, select in ways]
ignored = [",", r"\\$", r"(?s).*#### ", r"\\.$"]
for gold, text in json.load(open(sys.argv[1])):
    row = []
    for one in filters:
        (answer,) = list(one.apply([[text]], [{}]))[0]
        score = exact_match_hf_evaluate([answer], ["worked\\n#### " + gold], ignored, ignore_case=True)["exact_match"]
        row.append([answer, bool(score)])
    rows.append(row)
print(json.dumps(rows))
"""
    theirs = ask(LM_EVAL, tmp_path, script, given)
    ours = []
    for gold, text in given:
        found = [
            lm_eval.first(lm_eval.STRICT, text),
            lm_eval.first(lm_eval.STRICT_COT, text),
            lm_eval.last(lm_eval.FLEXIBLE, text),
        ]
        ours.append([[answer, lm_eval.exact_match(answer, gold)] for answer in found])
    assert sum(row[0][1] for row in theirs) > 100
    assert [(g, a, b) for g, a, b in zip(given, ours, theirs, strict=True) if a != b] == []


SURROUNDINGS = [
    "{}",
    "{}\n```\nThat is all.",
    "{}\n\nExplanation:\nIt is right.\n",
    "{}\nprint(1)\n",
    "{}\n\ndef other(x):\n    if x > (1 +",
    "{}\n\ndef unused(x):\n    return x\n",
    "{}\n\nclass Other:\n    def",
    "{}\n\nif __name__ == '__main__':\n    pass\n",
    "{}\n\ncache = {{}}\ncache[0] = 1\n",
    "{}\n\n@staticmethod\ndef decorated(x):\n    return x\n",
    "{}\nimport math\nx, y = 1, 2\n",
    "{}\n\ntry:\n    import numpy\nexcept ImportError:\n    pass\n",
    "{}\nfrom __future__ import annotations\n",
    "{}\nz: int = 3\n",
]


def test_evalplus_sanitizer(tmp_path: Path) -> None:
    given = [
        [surrounding.format(problem.reference["solution"].rstrip("\n")), problem.reference["names"]]
        for problem in get_task("humaneval").load(None)[::6]
        for surrounding in SURROUNDINGS
    ]
    script = """
import json, sys
from evalplus.sanitize import sanitize
print(json.dumps([sanitize(code, name) for code, name in json.load(open(sys.argv[1]))]))
"""
    theirs = ask(EVALPLUS, tmp_path, script, given)
    ours = [evalplus.sanitize(code, [name]) for code, name in given]
    assert len(given) > 300
    assert [(g[1], a, b) for g, a, b in zip(given, ours, theirs, strict=True) if a.strip() != b.strip()] == []


def plain_metamath(completion: str) -> int | None:
    """MetaMath's extract_answer_number, transcribed line by line: there is no package."""
    parts = completion.split("The answer is: ")
    if len(parts) <= 1:
        return None
    match = re.search(r"[\-+]?\d*[\.,/]?\d+", parts[-1].strip())
    if not match:
        return None
    text = match.group()
    if "/" in text:
        denominator, numerator = text.split("/")[1], text.split("/")[0]
        try:
            float(denominator), float(numerator)
        except ValueError:
            return None
        if denominator == "0":
            return round(float(numerator.replace(",", "")))
        fraction = Fraction(text.replace(",", ""))
        return round(float(fraction.numerator / fraction.denominator))
    value = float(text.replace(",", ""))
    return None if value == float("inf") else round(value)


def test_metamaths_numbers() -> None:
    texts = [text for _, text in replies(20_000)]
    assert [t for t in texts if metamath.extract_number(t) != plain_metamath(t)] == []
    assert sum(metamath.extract_number(t) is not None for t in texts) > 1000
