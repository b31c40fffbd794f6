"""Loading problems, and what the answer tasks make of completions. Code tasks: test_code_tasks.py."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dynrank_ds import prompts
from dynrank_ds.errors import DataError, ModelError, RecipeError
from dynrank_eval.jsonl import read_rows
from dynrank_eval.protocols import load_protocol
from dynrank_eval.tasks import TASKS, Judgement, Verdict, get_task
from dynrank_eval.tasks import gsm8k as gsm8k_module
from tests.support.scoring import write_rows

METAMATH = load_protocol("metamath-v1", "gsm8k")


def verdicts(judgements: list[Judgement]) -> Counter[Verdict]:
    return Counter(judgement.verdict for judgement in judgements)


def test_gsm8k_gold_answers_all_pass_and_others_do_not(data_dir: Path) -> None:
    task = get_task("gsm8k")
    problems = task.load(data_dir)
    texts = [str(row["answer"]) for _, row in read_rows(data_dir / "gsm8k" / "test.jsonl", ("answer",))]
    gold = [text.replace("#### ", "The answer is: ") for text in texts]
    assert verdicts(task.judge(problems, gold, METAMATH)) == {Verdict.CORRECT: 1319}
    assert verdicts(task.judge(problems, texts, METAMATH)) == {Verdict.INVALID: 1319}
    off_by_a_tenth = [text + ".1" for text in gold]
    assert verdicts(task.judge(problems, off_by_a_tenth, METAMATH)) == {Verdict.WRONG: 1319}
    few_shot = task.judge(problems, texts, load_protocol("lm-eval-gsm8k-5shot-v1", "gsm8k"))
    assert verdicts(few_shot) == {Verdict.CORRECT: 1319}
    assert all(judgement.grades == {"strict": True, "flexible": True} for judgement in few_shot)


def test_few_shot_prompts_equal_lm_evals(data_dir: Path) -> None:
    """The second problem's, by a plain transcription of lm-eval's sampler."""
    import random

    protocol, task = load_protocol("lm-eval-gsm8k-5shot-v1", "gsm8k"), get_task("gsm8k")
    assert protocol.fewshot is not None
    rows = [row for _, row in read_rows(data_dir / "gsm8k" / "train.jsonl", ("question", "answer"))]
    draw = random.Random(1234)
    draw.sample(rows, 5)
    shown = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in draw.sample(rows, 5)]
    problem = task.load(data_dir)[1]
    expected = "\n\n".join([*shown, f"Question: {problem.text}\nAnswer:"])
    contexts = protocol.fewshot.contexts(task.examples(data_dir), 2)
    assert contexts[1] + protocol.render(problem.text) == expected


@pytest.mark.parametrize("name", ["metamath-v1", pytest.param("chat-v1", marks=pytest.mark.slow)])
def test_math_500_gold_answers_all_pass(name: str, data_dir: Path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    task, protocol = get_task("math"), load_protocol(name, "math")
    problems = task.load(data_dir)
    assert problems[0].task_id == "test/precalculus/807.json"
    solutions = [
        str(row["solution"]) for _, row in read_rows(data_dir / "math" / "math500.jsonl", ("solution",))
    ]
    golds = [problem.reference["answer"] for problem in problems]
    if name == "metamath-v1":
        solutions = [f"{text}\nThe answer is: ${gold}$." for text, gold in zip(solutions, golds, strict=True)]
    judgements = task.judge(problems, solutions, protocol)
    wrong = [
        (p.task_id, j) for p, j in zip(problems, judgements, strict=True) if set(j.grades.values()) != {True}
    ]
    assert (len(problems), wrong) == (500, [])


def test_math_reports_both_graders_and_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    rows = [
        {"problem": "p", "solution": "so $\\boxed{\\frac{1}{4}}$", "unique_id": f"id{n}"} for n in range(4)
    ]
    write_rows(tmp_path / "MATH_test.jsonl", rows)
    task = get_task("math")
    problems = task.load(tmp_path)
    assert [problem.task_id for problem in problems] == ["id0", "id1", "id2", "id3"]
    completions = ["The answer is: \\frac14", "The answer is: 0.25", "The answer is: 4", "0.25"]
    judgements = task.judge(problems, completions, load_protocol("metamath-v1", "math"))
    assert [j.verdict for j in judgements] == ["correct", "wrong", "wrong", "invalid"]
    assert [j.grades["math_verify"] for j in judgements] == [True, True, False, False]
    chat = task.judge(
        problems, [f"\\boxed{{{text}}}" for text in ("1/4", "0.25")] * 2, load_protocol("chat-v1", "math")
    )
    assert verdicts(chat) == {Verdict.CORRECT: 4}


@pytest.mark.parametrize("name", ["gsm_symbolic", "gsm_symbolic_unseen"])
def test_gsm_symbolic_reads_its_own_file(name: str, tmp_path: Path) -> None:
    rows = [{"task_id": f"{name}-{i}", "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    write_rows(tmp_path / f"{name}.jsonl", rows)
    task = get_task(name)
    problems = task.load(tmp_path)
    assert [p.task_id for p in problems] == [row["task_id"] for row in rows]
    assert METAMATH.render(problems[0].text).endswith("0 + 1?\n\n### Response: Let's think step by step.")
    completions = ["The answer is: 1", "The answer is: 2.0 apples.\n\n### Instruction: The answer is: 9", "3"]
    assert [j.verdict for j in task.judge(problems, completions, METAMATH)] == [
        "correct",
        "correct",
        "invalid",
    ]


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
    write_rows(tmp_path / "test.jsonl", [{"question": "q", "answer": "12"}])
    with pytest.raises(DataError, match="####"):
        get_task("gsm8k").load(tmp_path)
    write_rows(tmp_path / "math" / "test.jsonl", [{"problem": "q", "solution": "12"}])
    with pytest.raises(DataError, match="boxed"):
        get_task("math").load(tmp_path)


def test_the_hub_is_asked_where_the_folder_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set library reads a local folder by the same call."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    hub = tmp_path / "hub"
    write_rows(hub / "test.jsonl", [{"question": "1 + 1?", "answer": "2\n#### 2"}])
    write_rows(hub / "train.jsonl", [{"question": "2 + 2?", "answer": "4\n#### 4"}])
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: test, path: test.jsonl}\n"
        "  - {split: train, path: train.jsonl}\n---\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gsm8k_module, "_HUB", str(hub))
    assert [problem.text for problem in get_task("gsm8k").load(None)] == ["1 + 1?"]
    assert [row["question"] for row in get_task("gsm8k").examples(None)] == ["2 + 2?"]
    monkeypatch.setattr(gsm8k_module, "_HUB", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="could not be fetched from the hub"):
        get_task("gsm8k").load(tmp_path)


@pytest.mark.parametrize(
    ("name", "asked", "row", "text"),
    [
        (
            "gsm8k",
            [("openai/gsm8k", "main", "test")],
            {"question": "1 + 1?", "answer": "2\n#### 2"},
            "1 + 1?",
        ),
        (
            "math",
            [("EleutherAI/hendrycks_math", "algebra", "test")],
            {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": "$\\boxed{2}$"},
            "1 + 1?",
        ),
        (
            "mbpp",
            [("google-research-datasets/mbpp", "sanitized", "test")],
            {
                "source_file": "Benchmark Questions Verification V2.ipynb",
                "task_id": 2,
                "prompt": "Add one.",
                "code": "def f(x):\n  return x + 1",
                "test_imports": [],
                "test_list": ["assert f(1) == 2"],
            },
            '"""\nAdd one.\nassert f(1) == 2\n"""\n',
        ),
    ],
)
def test_the_hubs_data_sets_are_asked_for_as_they_are_there(
    name: str,
    asked: list[tuple[str, str, str]],
    row: dict[str, object],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ids, configurations, splits and columns of the hub's cards."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    calls = []

    def load_dataset(hub: str, configuration: str, split: str) -> list[dict[str, object]]:
        calls.append((hub, configuration, split))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems = get_task(name).load(None)
    assert calls[:1] == asked and {problem.text for problem in problems} == {text}
    assert len(calls) == (7 if name == "math" else 1)


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: the libraries read these variables when they are imported."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    path = tmp_path / "completions.jsonl"
    path.write_text('{"task_id": "0", "completion": "x"}\n')
    command = [
        sys.executable,
        "-m",
        "dynrank_eval.cli",
        "score",
        "--task",
        "gsm8k",
        "--generations",
        str(path),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("dynrank-eval: gsm8k: no --data-dir was given, and")
    assert "could not be fetched from the hub" in line


def test_every_task_fits_its_protocols() -> None:
    for task in TASKS.values():
        assert task.name in load_protocol(task.default_protocol, task.name).tasks
    from importlib import resources

    names = [file.name.removesuffix(".yaml") for file in resources.files("dynrank_eval.protocols").iterdir()]
    loaded = 0
    for name in names:
        if name.startswith("_"):
            continue
        with pytest.raises(RecipeError, match=f"--protocol {name} does not fit"):
            load_protocol(name, "none")
        tasks = next(load_protocol(name, task).tasks for task in TASKS if _fits(name, task))
        for task in tasks:
            protocol = load_protocol(name, task)
            assert "{problem}" in protocol.prompt and protocol.max_new_tokens > 0
            assert protocol.differences or protocol.known_errors
            assert (protocol.code is None) == (
                bool(protocol.answers) or (protocol.reader == "stated" and name.endswith("v1"))
            ) or name == "chat-v2"
            loaded += 1
    assert loaded == 67
    with pytest.raises(RecipeError, match="metamath-v1"):
        load_protocol("metamath-v0", "gsm8k")
    with pytest.raises(RecipeError, match="gsm8k"):
        get_task("gsm9k")


def _fits(name: str, task: str) -> bool:
    try:
        load_protocol(name, task)
    except RecipeError:
        return False
    return True


def test_prompts_that_training_uses_are_the_same() -> None:
    assert METAMATH.render("1 {x}?") == prompts.render("metamath", "1 {x}?")
    assert load_protocol("pissa-v1", "math").render("1?") == prompts.render("alpaca", "1?")


def test_a_chat_protocol_needs_a_chat_template(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    protocol = load_protocol("chat-v1", "gsm8k")
    with pytest.raises(ModelError, match="chat template"):
        protocol.render("1 + 1?", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    rendered = protocol.render("1 + 1?", tokenizer)
    assert rendered.startswith("<s>[user]1 + 1?\n\nPlease reason") and rendered.endswith(
        "\\boxed{}.[assistant]"
    )
