"""Which changes a run may be resumed with, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dynrank_ds.errors import RunError
from dynrank_ds.recipe import Recipe, check_recipe, load_recipe
from dynrank_ds.training.resume import FORMER_VALUES, MAY_CHANGE, fingerprints, refuse_changes
from dynrank_ds.training.samples import prepare_data
from tests.support.recipes import lines, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of the run."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    recorded = {
        "recipe": recipe.model_dump(mode="json"),
        "identity": fingerprints(recipe, prepare_data(recipe)[0]),
    }
    return json.loads(json.dumps(recorded))


def refused(folder: Path, metadata: dict[str, Any], *overrides: str) -> str:
    """The refusal of a resume with these overrides; empty where it is allowed."""
    recipe = load_recipe(str(folder / "recipe.yaml"), overrides)
    try:
        refuse_changes(Path("run/step-5"), metadata, recipe, fingerprints(recipe, prepare_data(recipe)[0]))
    except RunError as error:
        return str(error)
    return ""


def test_a_run_of_constant_rate_and_fixed_ranks_may_be_made_longer(folder: Path) -> None:
    fixed = ("method.name=lora", "train.schedule=constant")
    recipe = load_recipe(str(folder / "recipe.yaml"), fixed)
    identity = fingerprints(recipe, prepare_data(recipe)[0])
    metadata = {"recipe": recipe.model_dump(mode="json"), "identity": identity}
    assert refused(folder, metadata, *fixed, "train.steps=30") == ""
    assert "train.steps is 10, was 20. Set these back" in refused(folder, metadata, *fixed, "train.steps=10")
    assert "train.seed is 1, was 0" in refused(folder, metadata, *fixed, "train.steps=30", "train.seed=1")


@pytest.mark.parametrize(
    "option",
    [
        "train.schedule=linear",
        "train.warmup=0.1",
        "train.schedule=constant",
    ],
)
def test_a_run_whose_first_steps_depend_on_its_length_may_not_be_made_longer(
    option: str, folder: Path
) -> None:
    method = () if option == "train.schedule=constant" else ("method.name=lora",)  # else PE-DyRA
    options = ("train.schedule=constant", *method, option)
    recipe = load_recipe(str(folder / "recipe.yaml"), options)
    identity = fingerprints(recipe, prepare_data(recipe)[0])
    metadata = {"recipe": recipe.model_dump(mode="json"), "identity": identity}
    assert "a run can be made longer only with train.schedule constant" in refused(
        folder, metadata, *options, "train.steps=30"
    )


def test_the_same_run_may_go_on(folder: Path, metadata: dict[str, Any]) -> None:
    assert refused(folder, metadata) == ""


@pytest.mark.parametrize(
    "override",
    [
        "train.micro_batch_size=3",
        "train.activation_checkpointing=true",
        "train.checkpoint_interval=7",
        "train.checkpoints_kept=1",
        "deepspeed.config=zero2",
        "deepspeed.timeout=60",
        "output.dir=elsewhere",
        "eval.tasks=[gsm8k]",
        "data.max_dropped=0.5",
        "model.attention=eager",
    ],
)
def test_where_things_lie_and_how_they_are_computed_may_change(
    override: str, folder: Path, metadata: dict[str, Any]
) -> None:
    assert refused(folder, metadata, override) == ""


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate is 0.001, was 0.005"),
        ("train.steps=30", "train.steps is 30, was 20"),
        ("train.global_batch_size=12", "train.global_batch_size is 12, was 6"),
        ("train.seed=1", "train.seed is 1, was 0"),
        ("adapter.rank=5", "adapter.rank is 5, was 4"),
        ("adapter.targets=[q_proj]", "adapter.targets is ['q_proj'], was ['q_proj', 'k_proj'"),
        ("method.k=3", "method.k is 3, was 5"),
        ("model.dtype=bf16", "model.dtype is 'bf16', was 'fp32'"),
        ("data.packing=true", "data.packing is True, was False"),
        ("data.limit=20", "data.limit is 20, was None; the tokenised data is a different one"),
    ],
)
def test_what_shapes_the_result_may_not_change_and_is_named(
    override: str, sentence: str, folder: Path, metadata: dict[str, Any]
) -> None:
    message = refused(folder, metadata, override)
    assert message.startswith("run/step-5 cannot be resumed")
    assert sentence in message and "give a new output.dir" in message


def test_another_method_is_refused_with_every_key_that_differs(
    folder: Path, metadata: dict[str, Any]
) -> None:
    values = metadata["recipe"] | {"method": {"name": "lora"}}
    with pytest.raises(RunError, match=r"method\.name is 'lora', was 'pe_dyra'"):
        refuse_changes(Path("run/step-5"), metadata, check_recipe(values, "r"), metadata["identity"])


def test_model_tokenizer_and_data_may_move_but_not_change(
    folder: Path, metadata: dict[str, Any], tmp_path: Path
) -> None:
    model, data = tmp_path / "copied", tmp_path / "copied.jsonl"
    shutil.copytree(folder / "model", model)
    shutil.copy(folder / "data.jsonl", data)
    moved = (f"model.path={model}", f"data.source={data}")
    assert refused(folder, metadata, *moved) == ""

    weights = load_file(model / "model.safetensors")
    changed = {name: value * 1.01 for name, value in weights.items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    assert "the base model is a different one" in refused(folder, metadata, *moved)
    save_file(weights, model / "model.safetensors", {"format": "pt"})

    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert "the tokenizer is a different one" in refused(folder, metadata, *moved)

    rows = lines(data)
    for row in rows:  # the same words, so that lengths stay
        row["response"] = " ".join(reversed(row["response"].split()))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the tokenised data is a different one" in refused(folder, metadata, *moved)


def test_every_key_that_may_change_is_one_of_the_recipe() -> None:
    for section, keys in MAY_CHANGE.items():
        assert keys <= set(Recipe.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]


@pytest.mark.parametrize(("section", "key"), [("model", "attention"), ("data", "packing"), ("method", "mix")])
def test_a_key_that_an_old_checkpoint_does_not_know_counts_as_its_default(
    section: str, key: str, folder: Path, metadata: dict[str, Any]
) -> None:
    before = json.loads(json.dumps(metadata))
    del before["recipe"][section][key]
    assert refused(folder, before) == ""


def test_a_section_that_an_old_checkpoint_does_not_know_counts_as_its_defaults(
    folder: Path, metadata: dict[str, Any]
) -> None:
    before = json.loads(json.dumps(metadata))
    del before["recipe"]["adapter"]
    assert "adapter.rank is 4" not in refused(folder, before)  # the default of adapter.rank is 4
    assert "adapter.alpha is 16.0, was 8.0" in refused(folder, before)


def test_a_key_whose_default_is_not_the_former_behaviour_counts_as_that(
    folder: Path, metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(json.dumps(metadata))
    del before["recipe"]["data"]["packing"]
    monkeypatch.setitem(FORMER_VALUES, "data.packing", True)
    assert "data.packing is False, was True" in refused(folder, before)
