"""An output is replaced only by the same evaluation made again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dynrank_eval.cli import main
from tests.support.scoring import score_arguments


def other_limit(folder: Path) -> list[str]:
    return ["--limit", "3"]


def other_protocol(folder: Path) -> list[str]:
    return ["--protocol", "metamath-v2"]


def other_completions(folder: Path) -> list[str]:
    path = folder / "generations.jsonl"
    path.write_text(path.read_text().replace("The answer is: 0", "The answer is: 5"))
    return []


def other_data(folder: Path) -> list[str]:
    path = folder / "data" / "gsm_symbolic.jsonl"
    path.write_text(path.read_text().replace("3 + 1?", "1 + 3?"))
    return []


@pytest.mark.parametrize("change", [other_limit, other_protocol, other_completions, other_data])
def test_score_replaces_only_the_same_evaluation(
    change: Callable[[Path], list[str]],
    data: Path,
    generations: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = [*score_arguments(data, generations), "--output", str(out)]
    assert main(command) == 0
    # The same again, with another summary: allowed.
    assert main([*command, "--k", "1"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*command, *change(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"--output {out} holds" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "{}", "is not an evaluation's"),
        ("results.json", "no JSON", "is not an evaluation's"),
        ("results.json", '{"tasks": {}, "run": {}}', "holds another evaluation"),
        ("samples.jsonl", "", "holds completions without results"),
    ],
)
def test_score_keeps_files_that_it_did_not_write(
    name: str,
    text: str,
    message: str,
    data: Path,
    generations: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    assert main([*score_arguments(data, generations), "--output", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == text


def test_run_keeps_the_scores_of_given_completions_and_of_other_data(
    tiny_model: Path, data: Path, generations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored, generated = tmp_path / "scored", tmp_path / "generated"
    assert main([*score_arguments(data, generations), "--output", str(scored)]) == 0
    run = ["run", "--model", str(tiny_model), "--engine", "hf", "--dtype", "float32", "--max-new-tokens", "2"]
    run += ["--task", "gsm_symbolic", "--data-dir", str(data)]
    assert main([*run, "--output", str(scored)]) == 2
    assert "holds the scores of other completions" in capsys.readouterr().err
    assert main([*run, "--output", str(generated)]) == 0
    assert main([*run, "--output", str(generated)]) == 0
    before = (generated / "results.json").read_bytes()
    path = data / "gsm_symbolic.jsonl"
    # The prompts are the same, so that nothing is generated anew; the references are not.
    path.write_text(path.read_text().replace('"answer": "1"', '"answer": "7"'))
    assert main([*run, "--output", str(generated)]) == 2
    assert "holds another evaluation" in capsys.readouterr().err
    assert (generated / "results.json").read_bytes() == before


def test_compare_replaces_no_other_file(
    data: Path, generations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "comparison.json"
    assert main([*score_arguments(data, generations), "--output", str(out)]) == 0
    command = ["compare", str(out), str(out), "--output", str(file)]
    assert main(command) == 0 and main(command) == 0
    file.write_text("something else")
    assert main(command) == 2
    assert "holds something else" in capsys.readouterr().err and file.read_text() == "something else"
