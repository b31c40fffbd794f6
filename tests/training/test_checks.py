"""What cannot run is refused by `dynrank validate` and the training script, before processes meet."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from dynrank_ds.cli import main
from dynrank_ds.errors import RecipeError
from dynrank_ds.recipe import check_recipe
from dynrank_ds.training.checks import check_steps
from tests.support.methods import METHODS
from tests.support.tiny import write_data, write_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("materials")
    write_model(folder / "model")
    write_data(folder / "data.jsonl", samples=12, longest=20)
    return folder


@pytest.fixture
def folder(materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model and the data, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(materials, tmp_path / "given")


def values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": str(folder / "data.jsonl"), "max_length": 200},
        "method": {"name": "lora"},
        "train": {"steps": 20, "global_batch_size": 4, "learning_rate": 1e-3},
        "output": {"dir": str(folder / "run")},
    }
    return {**given, **{name: {**given.get(name, {}), **section} for name, section in sections.items()}}


def refused(
    folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **sections: dict[str, Any]
) -> str:
    Path("r.yaml").write_text(yaml.safe_dump(values(folder, **sections)))
    assert main(["validate", "--recipe", "r.yaml", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not (folder / "run").exists()
    return err.removeprefix("error: ").rstrip("\n")


def test_the_number_of_processes_is_checked_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = {"global_batch_size": 12, "micro_batch_size": 2}
    assert "12 is no multiple of train.micro_batch_size 2 x 4 processes = 8" in refused(
        folder, capsys, "--processes", "4", train=batch
    )
    assert main(["validate", "--recipe", "r.yaml", "--processes", "3"]) == 0
    assert "processes   3, each 2 micro-batches of 2 a step" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["validate", "--recipe", "r.yaml", "--processes", "0"])


def test_samples_that_the_model_cannot_read_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30}))
    message = refused(folder, capsys)
    assert (
        "but model.path" in message
        and "has 30 positions" in message
        and message.endswith("lower data.max_length to 30")
    )
    (folder / "model" / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    tokenizer.save_pretrained(folder / "model")
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"query": "w1", "response": "new39"}\n')
    assert f"its tokenizer gives the token {len(tokenizer) - 1}, but its embedding has 100 rows" in refused(
        folder, capsys
    )


def test_fewer_rows_than_a_global_batch_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(folder, capsys, train={"global_batch_size": 16}).startswith(
        "12 samples are fewer than train.global_batch_size 16"
    )


def test_unknown_tasks_of_the_evaluation_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(folder, capsys, eval={"tasks": ["gsm8k", "gms8k"]}).startswith(
        "eval.tasks names 'gms8k': known are gsm_symbolic,"
    )
    Path("r.yaml").write_text(yaml.safe_dump(values(folder, eval={"tasks": ["HumanEval+", "gsm8k"]})))
    assert main(["validate", "--recipe", "r.yaml"]) == 0


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_model_files_that_are_not_what_they_are_called_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder / "model"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (model / name).read_bytes()
        (model / name).write_text(POINTER)
        assert f"{name} is a Git LFS pointer, not the file: run `git lfs pull`" in refused(folder, capsys)
        (model / name).write_bytes(whole)
    (model / "model.safetensors").rename(folder / "kept")
    assert "has no weights (*.safetensors)" in refused(folder, capsys)
    torch.save({}, model / "pytorch_model.bin")
    assert "holds its weights as pytorch_model.bin, a pickle file, which is never read: convert" in refused(
        folder, capsys
    )
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "kept").rename(model / "model-1.safetensors")
    assert "lacks 1 of its 2 weight files, the first model-2.safetensors" in refused(folder, capsys)


def test_a_model_with_code_of_its_own_is_refused_and_nobody_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    config = json.loads((folder / "model" / "config.json").read_text())
    code = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.New"}
    new = {**config, "model_type": "new", "auto_map": code}
    (folder / "model" / "config.json").write_text(json.dumps(new))
    assert "is a new model, which needs code of its own (auto_map in config.json)" in refused(folder, capsys)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    path = folder / "model" / "tokenizer_config.json"
    metadata = json.loads(path.read_text())
    metadata.update(
        tokenizer_class="NewTokenizer", auto_map={"AutoTokenizer": [None, "tokenization_new.New"]}
    )
    path.write_text(json.dumps(metadata))
    Path("r.yaml").write_text(yaml.safe_dump(values(folder)))
    assert main(["validate", "--recipe", "r.yaml"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lora"])
def test_a_schedule_without_room_is_reported_with_the_steps_and_values_that_would_do(
    name: str, folder: Path
) -> None:
    section = dict(METHODS[name])
    times = {key: 500 for key in ("interval", "t_i", "disconnect_at") if key in section}
    given = values(folder, method={**section, "name": section["name"], **times}, train={"steps": 40})
    recipe = check_recipe(given, "r.yaml")
    with pytest.raises(RecipeError) as error:
        check_steps(recipe, 100)
    assert "train.steps is 40" in str(error.value)
    if "disconnect_at" in times:
        return  # its message says from which step to which
    one = {**given, "method": {**section, next(iter(times)): 500}}
    with pytest.raises(RecipeError, match=r"would do\)$") as error:
        check_steps(check_recipe(one, "r.yaml"), 100)
    key, value = str(error.value).rsplit("method.", 1)[1].split()[:2]
    mended = {**given, "method": {**section, next(iter(times)): 500, key: int(value)}}
    check_steps(check_recipe(mended, "r.yaml"), 100)
    mended["method"][key] = int(value) + 1
    with pytest.raises(RecipeError):
        check_steps(check_recipe(mended, "r.yaml"), 100)


def test_steps_that_follow_from_epochs_are_reported_with_their_origin(folder: Path) -> None:
    method = {"name": "pe_dyra", "t_i": 4, "interval": 3, "t_f": 5}
    given = values(folder, method=method, train={"steps": None, "epochs": 2, "warmup": 3})
    recipe = check_recipe(given, "r.yaml")
    origin = "6 steps are train.epochs 2 of 12 samples in global batches of 4"
    with pytest.raises(RecipeError) as error:
        check_steps(recipe, 12)
    assert origin in str(error.value)
    check_steps(recipe, 1200)
    given["train"]["warmup"] = 7
    with pytest.raises(RecipeError) as error:
        check_steps(check_recipe(given, "r.yaml"), 12)
    assert str(error.value) == (
        f"train.warmup is 7 steps, longer than training ({origin}): lower it to at most 6"
    )


def launched(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The training script as the second process of two, the first of which never comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "launcher" / "train.py"), "--recipe", "r.yaml", *overrides],
        cwd=folder,
        env={**os.environ, **alone, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_training_script_refuses_before_it_waits_for_the_others(folder: Path) -> None:
    (folder / "r.yaml").write_text(yaml.safe_dump(values(folder, train={"warmup": 50})))
    done = launched(folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: train.warmup is 50 steps, longer than training (train.steps is 20): lower it to at most 20"
    )
    assert not (folder / "run").exists()
