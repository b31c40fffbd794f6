"""The protocols of EvalPlus against the package itself, in an environment of its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynrank_eval.jobs import Selection, prepare
from dynrank_eval.protocols import load_protocol
from dynrank_eval.tasks import get_task
from dynrank_eval.tasks.base import Verdict
from dynrank_eval.transcriptions import evalplus
from tests.eval.transcriptions.replies import code_replies
from tests.support.environments import ask, environment
from tests.support.scoring import write_rows

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ask_evalplus.py")
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
# Inputs of HumanEval problems, in the layout of HumanEval+.
INPUTS: dict[str, tuple[list[Any], list[Any]]] = {
    "HumanEval/0": ([[[1.0, 2.0, 3.9], 0.3]], [[[1.0, 1.1], 0.5], [[], 1.0]]),
    "HumanEval/2": ([[3.5]], [[1.33], [123.456]]),
    "HumanEval/4": ([[[1.0, 2.0, 3.0]]], [[[1.0, 2.0, 3.0, 4.0]]]),
    "HumanEval/23": ([["abc"]], [[""], ["x" * 50]]),
    "HumanEval/34": ([[[5, 3, 5, 2]]], [[[]], [[1, 1]]]),
    "HumanEval/45": ([[5, 3]], [[2, 2], [10, 8]]),
    "HumanEval/53": ([[0, 1]], [[-5, 7], [10**20, 1]]),
    "HumanEval/60": ([[30]], [[1], [100]]),
}


def render(messages: list[dict[str, str]], tokenize: bool) -> str:
    return "".join(f"<{message['role']}>{message['content']}</{message['role']}>" for message in messages)


def test_evalplus_prompts_sanitizer_and_verdicts(tmp_path: Path) -> None:
    from dynrank_eval.jsonl import read_rows
    from dynrank_eval.tasks.humaneval import _packaged

    rows = {row["task_id"]: row for _, row in read_rows(_packaged(), ("task_id",))}
    problems = [
        {
            **{key: rows[name][key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")},
            "base_input": base,
            "plus_input": plus,
            "atol": 0,
        }
        for name, (base, plus) in INPUTS.items()
    ]
    replies = [code_replies(row["prompt"], row["canonical_solution"], row["entry_point"]) for row in problems]
    write_rows(tmp_path / "HumanEvalPlus.jsonl", problems)
    sanitized = [
        (surrounding.format(problem.reference["solution"].rstrip("\n")), problem.reference["names"])
        for problem in get_task("humaneval").load(None)[::6]
        for surrounding in SURROUNDINGS
    ]
    base = [
        [row["prompt"].strip() + "\n" + text.replace("\t", "    ") for text in texts]
        for row, texts in zip(problems, replies, strict=True)
    ]
    chat = [[text.replace("\t", "    ") for text in texts] for texts in replies]
    question = {
        "problems": problems,
        "sanitize": sanitized,
        "solutions": [[*one, *other] for one, other in zip(base, chat, strict=True)],
    }
    theirs = ask(environment("evalplus", ["evalplus==0.3.1", "setuptools"]), SCRIPT, question)

    kept = [evalplus.sanitize(code, [name]) for code, name in sanitized]
    assert len(kept) > 300
    pairs = zip(sanitized, kept, theirs["sanitized"], strict=True)
    assert [(code, a, b) for (code, _), a, b in pairs if a.strip() != b.strip()] == []
    tokenizer = SimpleNamespace(chat_template="some", apply_chat_template=render)
    for place, name in enumerate(("evalplus-base-v2", "evalplus-chat-v2")):
        (job,) = prepare(Selection(["humaneval_plus"], name, tmp_path), generating=True, scoring=False)
        assert job.prompts(tokenizer) == [both[place] for both in theirs["prompts"]]
        stops = {"chat": "chat", "base": "humaneval"}[name.split("-")[1]]
        assert list(job.protocol.stop) == theirs["stops"][stops]
        flat = [
            (problem, text) for problem, texts in zip(job.problems, replies, strict=True) for text in texts
        ]
        judged = job.task.judge([problem for problem, _ in flat], [text for _, text in flat], job.protocol)
        count = len(replies[0])
        verdicts = [
            verdict for row in theirs["verdicts"] for verdict in row[place * count : (place + 1) * count]
        ]
        differ = [
            (text, judgement, parts)
            for (_, text), judgement, parts in zip(flat, judged, verdicts, strict=True)
            if (judgement.verdict is Verdict.CORRECT) != (parts == ["pass", "pass"])
            or judgement.grades["base"] != (parts[0] == "pass")
        ]
        assert differ == []
        assert 8 < sum(parts == ["pass", "pass"] for parts in verdicts) < len(verdicts)
    assert list(load_protocol("evalplus-base-v2", "mbpp").stop) == theirs["stops"]["mbpp"]
