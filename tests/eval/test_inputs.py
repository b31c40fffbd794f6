"""Files and options as people have them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dynrank_ds.errors import DataError, MachineError, ModelError, RecipeError, RunError
from dynrank_eval.cli import main
from dynrank_eval.comparison import compare
from dynrank_eval.engines.serving import check_batch_invariance, check_heads
from dynrank_eval.jsonl import read_rows
from dynrank_eval.statistics import sign_flip_test
from dynrank_eval.tasks import get_tasks
from tests.support.scoring import results, samples, score_arguments, write_rows


def test_task_names_are_read_in_any_case_and_all_unknown_ones_are_named() -> None:
    names = [task.name for task in get_tasks(["GSM8K", "HumanEval+", "mbpp-plus", " Math "])]
    assert names == ["gsm8k", "humaneval_plus", "mbpp_plus", "math"]
    with pytest.raises(RecipeError, match="'gsm9k', 'mth': there is no such task"):
        get_tasks(["gsm9k", "GSM8K", "mth"])


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"task_id": 1}\n')
    assert list(read_rows(path, ("task_id",))) == [(1, {"task_id": 1})]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_given_twice_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('{"task_id": 1, "completion": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="the key 'completion' is given twice"):
        list(read_rows(path, ("task_id",)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": True}, "'tokens' is True, not a whole number"),
        ({"truncated": 1}, "'truncated' is 1, not true or false"),
        ({"solution": "x"}, "has both of the keys"),
        ({"task": "gsm9k"}, "there is no task 'gsm9k'"),
    ],
)
def test_rows_of_other_types_are_refused(
    row: dict[str, object], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text(json.dumps({"task_id": "gsm_symbolic-0", "completion": "x", **row}) + "\n")
    assert main([*score_arguments(data, path), "--limit", "1", "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_tasks_in_rows_are_read_in_any_case(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text(
        json.dumps({"task": "GSM_Symbolic", "task_id": "gsm_symbolic-0", "completion": "1"}) + "\n"
    )
    assert main([*score_arguments(data, path), "--limit", "1", "--output", str(tmp_path / "out")]) == 0
    assert samples(tmp_path / "out")[0]["verdict"] == "correct"


def test_heads_that_vllm_cannot_serve_are_named_before_anything_starts(tmp_path: Path) -> None:
    LlamaConfig(num_attention_heads=8, hidden_size=64, head_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"heads of size 8, which vLLM cannot serve .* use --engine hf"):
        check_heads(str(tmp_path))
    LlamaConfig(num_attention_heads=8, hidden_size=512).save_pretrained(tmp_path)
    check_heads(str(tmp_path))


def test_batch_invariance_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 starts there, and its first forward is a TypeError."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="this machine has no GPU"):
        check_batch_invariance("vllm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_batch_invariance("vllm")
    with pytest.raises(MachineError, match="--engine hf has none"):
        check_batch_invariance("hf")


def scored(data: Path, folder: Path, right: list[list[bool]]) -> Path:
    """An evaluation of gsm_symbolic whose completions are right or wrong as said, by problem."""
    folder.mkdir()
    rows = [
        {"task_id": f"gsm_symbolic-{place}", "completion": f"The answer is: {place + 1 if good else 99}"}
        for place, each in enumerate(right)
        for good in each
    ]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = ["--n", str(len(right[0])), "--limit", str(len(right))]
    assert (
        main([*score_arguments(data, folder / "given.jsonl"), *counts, "--output", str(folder / "out")]) == 0
    )
    return folder / "out"


def test_several_completions_are_compared_by_their_means_and_a_tie_is_not_solved(
    data: Path, tmp_path: Path
) -> None:
    first = scored(data, tmp_path / "a", [[True, False], [True, True], [False, False], [True, False]])
    second = scored(data, tmp_path / "b", [[True, True], [True, True], [True, False], [True, False]])
    (done,) = compare(first, second)
    assert (done.difference, done.second_higher) == (0.25, ["gsm_symbolic-0", "gsm_symbolic-2"])
    assert "both" not in done.as_json() and done.as_json()["equal"] == ["gsm_symbolic-1", "gsm_symbolic-3"]
    # Two differences of one half: two of four sign choices are as extreme.
    assert done.p_value == 0.5 and done.interval[0] <= 0.25 <= done.interval[1]


def test_other_numbers_of_completions_or_problems_are_refused(data: Path, tmp_path: Path) -> None:
    first = scored(data, tmp_path / "a", [[True, False]] * 4)
    for name, right in (("b", [[True]] * 4), ("c", [[True, False]] * 3)):
        with pytest.raises(
            RunError, match=r"different numbers of completions per problem|different problems"
        ):
            compare(first, scored(data, tmp_path / name, right))


def test_the_permutation_test_equals_enumeration() -> None:
    assert sign_flip_test([0.5, 0.5, 0.25]) == 0.25
    assert sign_flip_test([0.0, 0.0]) == 1.0
    many = sign_flip_test([0.1] * 30)
    assert 0 < many < 1e-3
    assert sign_flip_test([0.5] * 10 + [-0.5] * 10) == pytest.approx(1.0, abs=0.01)


def test_results_hold_what_a_paper_needs(
    tiny_model: Path, tiny_adapter: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [
        "run",
        "--model",
        str(tiny_model),
        "--adapter",
        str(tiny_adapter),
        "--engine",
        "hf",
        "--n",
        "2",
    ]
    arguments += ["--temperature", "0.7", "--top-p", "0.9", "--max-new-tokens", "4", "--task", "gsm_symbolic"]
    assert main([*arguments, "--data-dir", str(data), "--k", "1,2", "--output", str(tmp_path / "out")]) == 0
    entry, run = results(tmp_path / "out")["tasks"]["gsm_symbolic"], results(tmp_path / "out")["run"]
    assert (entry["max_new_tokens"], entry["shots"], entry["protocol"]) == (4, 0, "dynrank-math-v1")
    assert (
        entry["stop"] and 0 <= entry["truncated_rate"] <= 1 and set(entry["pass_at_interval"]) == {"1", "2"}
    )
    assert entry["data"]["variant"] == "gsm_symbolic" and len(entry["data"]["sha256"]) == 64
    assert len(run["model"]["sha256"]) == len(run["adapter"]["sha256"]) == 64
    assert run["sampling"] == {"gsm_symbolic": {"temperature": 0.7, "top_p": 0.9}}
    assert run["max_new_tokens"] == {"gsm_symbolic": 4}
    assert run["dtype"] in ("bf16", "fp32") and run["device"] and run["versions"]["dynrank-ds"]
    limited = [row["truncated"] for row in samples(tmp_path / "out")]
    assert all(isinstance(value, bool) for value in limited)


def test_math_says_which_grader_decided_and_breaks_down_by_subject_and_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "problem": "p",
            "solution": "",
            "answer": answer,
            "unique_id": f"id{n}",
            "subject": subject,
            "level": 2,
        }
        for n, (answer, subject) in enumerate(
            [("7", "Algebra"), ("odd", "Algebra"), ("52_8", "Number Theory")]
        )
    ]
    write_rows(tmp_path / "math.jsonl", rows)
    given = [
        {"task_id": f"id{n}", "completion": f"\\boxed{{{text}}}"}
        for n, text in enumerate(["7.0", "odd", "52"])
    ]
    write_rows(tmp_path / "given.jsonl", given)
    arguments = ["score", "--task", "math", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--generations", str(tmp_path / "given.jsonl")]) == 0
    entry = results(tmp_path / "out")["tasks"]["math"]
    assert entry["decided_by"] == {"text": 1, "value": 2}
    shares = {
        group: {value: (found["score"], found["n"]) for value, found in values.items()}
        for group, values in entry["groups"].items()
    }
    assert shares == {
        "level": {"2": (2 / 3, 3)},
        "subject": {"Algebra": (1.0, 2), "Number Theory": (0.0, 1)},
    }
    printed = capsys.readouterr().out
    assert "decided by text 1, value 2" in printed
    assert "by subject: Algebra 100.0% of 2, Number Theory 0.0% of 1" in printed
