from __future__ import annotations

import copy
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynrank_ds.cli import main
from dynrank_ds.recipe import load_recipe
from tests.support.tiny import write_data, write_model


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("materials")
    write_model(folder / "model")
    write_data(folder / "data.jsonl", samples=12, longest=20)
    return folder


@pytest.fixture
def values(materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that is right, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": {"path": str(materials / "model")},
        "data": {"source": str(materials / "data.jsonl"), "max_length": 200},
        "adapter": {"rank": 2, "alpha": 4.0},
        "method": {"name": "pe_dyra", "t_i": 4, "interval": 3, "t_f": 5},
        "train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
        "output": {"dir": "run"},
    }


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail by the contract, and returns its sentence."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before
    return err.removeprefix("error: ").rstrip("\n")


def test_a_right_recipe_is_described(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(yaml.safe_dump(values))
    assert main(["validate", "--recipe", "r.yaml", "train.steps=17"]) == 0
    out = capsys.readouterr().out
    assert "12 samples" in out and "14 linears, total rank 28" in out
    assert "pe_dyra: 2 adjustments in 17 steps" in out  # at 7 and 10; 13 is too late
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["r.yaml"]


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("train", {"stepz": 3}, "r.yaml: unknown key 'train.stepz': did you mean 'steps'?"),
        ("train", {"steps": "many"}, "r.yaml: 'train.steps' is 'many': input should be a valid integer"),
        ("train", {"epochs": 2}, "r.yaml: both of train.steps and train.epochs is given"),
        ("train", {"micro_batch_size": 3}, "train.global_batch_size 4 is no multiple of"),
        ("adapter", {"max_rank": 1}, "r.yaml: adapter.max_rank 1 is below adapter.rank 2"),
        ("adapter", {"rank": 30}, "adapter.rank is 30, but model.layers.0.self_attn.k_proj is 18 x 36"),
        ("adapter", {"targets": ["query"]}, "adapter.targets names 'query', but the model has no linear"),
        ("method", {"interval": 40}, "method.t_i 4 + method.interval 40 leaves no adjustment before"),
        ("method", {"interval": 0}, "method.interval is 0, 0 of the 20 steps"),
        ("data", {"source": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ("data", {"source": "empty.jsonl"}, "empty.jsonl: the data set is empty"),
        ("data", {"format": "alpacca"}, "data.format is 'alpacca': known are alpaca, chat, codefeedback"),
        ("model", {"path": "./nowhere"}, "model.path ./nowhere does not exist"),
        ("model", {"path": "."}, "model.path . has no config.json"),
        ("deepspeed", {"config": "batch.json"}, "deepspeed.config batch.json sets 'train_batch_size'"),
        ("deepspeed", {"config": "zero9"}, "deepspeed.config is 'zero9': neither a file nor one of"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_in_one_sentence(
    section: str,
    change: dict[str, Any],
    sentence: str,
    values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty.jsonl").touch()
    Path("batch.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 3}}))
    wrong = copy.deepcopy(values)
    wrong[section] = {**wrong.get(section, {}), **change}
    Path("r.yaml").write_text(yaml.safe_dump(wrong))
    assert refused(["validate", "--recipe", "r.yaml"], capsys).startswith(sentence)


def test_a_model_without_tokenizer_is_refused(
    values: dict[str, Any], materials: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (Path("bare") / name).symlink_to(materials / "model" / name)
    Path("r.yaml").write_text(yaml.safe_dump({**values, "model": {"path": "bare"}}))
    assert "model.path bare holds no tokenizer" in refused(["validate", "--recipe", "r.yaml"], capsys)


def test_what_is_no_recipe_is_refused(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "recipe 'r.yaml' is neither a file nor one of" in refused(
        ["validate", "--recipe", "r.yaml"], capsys
    )
    Path("r.yaml").write_text("train: [1\n")
    assert refused(["validate", "--recipe", "r.yaml"], capsys).startswith("r.yaml is not valid YAML")
    assert "override 'steps=3' is not of the form" in refused(
        ["validate", "--recipe", "quickstart", "steps=3"], capsys
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--run", "nowhere", "--output", "adapter"],
        ["merge", "--adapter", "nowhere", "--output", "merged"],
        ["inspect", "--adapter", "nowhere"],
        ["resize", "--adapter", "nowhere", "--output", "smaller", "--rank", "2"],
        ["report", "--run", "nowhere"],
    ],
)
def test_a_missing_run_or_adapter_is_named_and_nothing_is_made(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refused(arguments, capsys)


def test_an_output_that_cannot_be_written_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "merged"))

    monkeypatch.setattr("dynrank_ds.export.merge_adapter", full)
    arguments = ["merge", "--adapter", "a", "--output", str(tmp_path / "merged")]
    assert refused(arguments, capsys) == f"{tmp_path / 'merged'}: No space left on device"


def test_a_home_folder_is_found_in_a_recipe() -> None:
    overrides = ["output.dir=~/run", "model.path=~/model"]
    recipe = load_recipe("quickstart", overrides)
    assert recipe.output.dir == f"{Path.home()}/run" and recipe.model.path == f"{Path.home()}/model"


@pytest.mark.parametrize(
    "command", ["validate", "prepare", "export", "merge", "inspect", "resize", "suggest-ranks", "report"]
)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: dynrank {command} --" in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("validate", "export", "merge", "report"))
