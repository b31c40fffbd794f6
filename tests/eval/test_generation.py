"""Generating in parts, several completions per problem, and comparing two evaluations."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynrank_eval.cli import main
from dynrank_eval.statistics import mcnemar_exact
from tests.support.scoring import results, samples, score_arguments


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class KilledError(Exception):
    """What ends a generation in the middle."""


def test_generation_goes_on_where_it_stopped(
    tiny_model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Drawn at a temperature, two per problem: the same file as without the interruption."""
    tasks = ["--task", "gsm_symbolic,gsm_symbolic_unseen", "--data-dir", str(data)]
    model = ["--model", str(tiny_model), "--engine", "hf", "--dtype", "float32", "--max-new-tokens", "6"]
    command = ["generate", *model, *tasks, "--n", "2", "--temperature", "0.8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--output", str(whole)]) == 0
    assert len(samples(whole)) == 18 and len({row["completion"] for row in samples(whole)}) > 10

    from dynrank_eval.engines.hf import HfEngine

    generate = HfEngine.generate

    def interrupted(self: HfEngine, requests: Any) -> Any:
        for count, item in enumerate(generate(self, requests)):
            if count == 5:
                raise KilledError
            yield item

    monkeypatch.setattr(HfEngine, "generate", interrupted)
    with pytest.raises(KilledError):
        main([*command, "--output", str(parts)])
    monkeypatch.setattr(HfEngine, "generate", generate)
    assert len(samples(parts)) == 5
    with open(parts / "samples.jsonl", "a") as file:
        file.write('{"task": "gsm_symbolic", "task_id": "gsm_sy')
    assert main([*command, "--output", str(parts)]) == 0
    assert tree(parts) == tree(whole)

    # Complete: nothing is loaded any more. With another seed it would be another file.
    monkeypatch.setattr(HfEngine, "__init__", None)
    assert main([*command, "--output", str(parts)]) == 0
    assert main([*command, "--seed", "1", "--output", str(parts)]) == 2
    assert "was begun with another seed (0, now 1)" in capsys.readouterr().err
    scored = ["score", *tasks, "--generations", str(parts / "samples.jsonl"), "--n", "2", "--k", "1,2"]
    assert main([*scored, "--output", str(tmp_path / "scored")]) == 0
    entry = results(tmp_path / "scored")["tasks"]["gsm_symbolic"]
    assert (entry["n"], entry["samples_per_problem"], set(entry["pass_at"])) == (6, 2, {"1", "2"})
    assert main([*command, "--output", str(tmp_path / "scored")]) == 2
    assert "holds samples.jsonl of something else" in capsys.readouterr().err


def test_several_samples_give_pass_at_k(data: Path, tmp_path: Path) -> None:
    rows = [
        {"task_id": f"gsm_symbolic-{i}", "completion": f"The answer is: {i + 1 if sample < solved else 0}"}
        for i, solved in enumerate((0, 1, 2, 3, 3, 0))
        for sample in range(3)
    ]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert main([*score_arguments(data, path), "--n", "3", "--k", "1,2", "--output", str(out)]) == 0
    entry = results(out)["tasks"]["gsm_symbolic"]
    assert entry["score"] == entry["pass_at"]["1"] == pytest.approx(9 / 18)
    # 1 - C(3 - c, 2) / C(3, 2) over c = 0, 1, 2, 3, 3, 0.
    assert entry["pass_at"]["2"] == pytest.approx((0 + 2 / 3 + 1 + 1 + 1 + 0) / 6)
    assert entry["n"] == 6 and entry["interval"][0] > 0.15
    assert [row["sample"] for row in samples(out)[:4]] == [0, 1, 2, 0]


def test_scoring_again_gives_the_same_bytes_but_for_the_run_block(
    data: Path, generations: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        assert main([*score_arguments(data, generations), "--output", str(folder)]) == 0
    texts = [(folder / "results.json").read_text() for folder in folders]
    assert len({text.split('"run": {')[0] for text in texts}) == 1
    assert len({(folder / "samples.jsonl").read_bytes() for folder in folders}) == 1


def test_scores_do_not_take_the_place_of_a_models_completions(
    data: Path, generations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples.jsonl").write_text(generations.read_text())
    for other, made in ((out / "samples.jsonl", False), (generations, True)):
        if made:
            (out / "generation.json").write_text("{}")
        assert main([*score_arguments(data, other), "--output", str(out)]) == 2
        assert "holds completions of a model; name another folder" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_text() == generations.read_text()


def test_compare_pairs_the_problems(
    data: Path, generations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*score_arguments(data, generations), "--output", str(first)]) == 0
    texts = (
        generations.read_text()
        .replace('The answer is: 1"', 'None"')
        .replace("I do not know.", "The answer is: 6")
    )
    generations.write_text(texts.replace('The answer is: 0"', 'The answer is: 5"'))
    assert main([*score_arguments(data, generations), "--output", str(second)]) == 0
    capsys.readouterr()
    out = tmp_path / "comparison.json"
    assert main(["compare", str(first), str(second), "--output", str(out)]) == 0
    entry = json.loads(out.read_text())["gsm_symbolic"]
    assert entry["only_first"] == ["gsm_symbolic-0"]
    assert entry["only_second"] == ["gsm_symbolic-4", "gsm_symbolic-5"]
    assert (len(entry["both"]), entry["neither"], entry["difference"]) == (3, [], pytest.approx(1 / 6))
    assert entry["p_value"] == mcnemar_exact(1, 2)
    assert "+16.7%" in capsys.readouterr().out

    for no_run in (tmp_path, out):
        assert main(["compare", str(first), str(no_run)]) == 2
        assert "has no results.json" in capsys.readouterr().err
    assert main(["compare", str(first), str(second), "--output", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    changed = (second / "results.json").read_text().replace('"data_hash": "', '"data_hash": "0')
    (second / "results.json").write_text(changed)
    assert main(["compare", str(first), str(second)]) == 2
    assert "they hold different problems" in capsys.readouterr().err
