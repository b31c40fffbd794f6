from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynrank_ds.errors import ModelError
from dynrank_ds.recipe_sections import ModelSection
from dynrank_ds.training.loss import SummedLoss
from dynrank_ds.training.model import load_model, load_tokenizer, model_without_weights
from tests.support.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def section(path: Path, **values: str) -> ModelSection:
    return ModelSection(path=str(path), **{"dtype": "fp32", **values})


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 4, 6), (3, 20, 1)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_summed_loss_is_transformers_mean_times_the_targets(
    folder: Path, lengths: tuple[int, ...], attention: str
) -> None:
    torch.manual_seed(0)
    model = load_model(section(folder, attention=attention), activation_checkpointing=False)
    longest, prompt = max(lengths), 2
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 90, mask.shape).where(mask.bool(), 2)
    labels = ids.where(mask.bool() & (torch.arange(longest) >= prompt), -100)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    targets = [
        (row * longest + t - 1, int(ids[row, t]))
        for row, length in enumerate(lengths)
        for t in range(prompt, length)
    ]
    positions, wanted = torch.tensor(targets).T
    ours = SummedLoss(model)(ids, positions, wanted)
    torch.testing.assert_close(ours, theirs.double() * len(targets), rtol=1e-6, atol=0)


def test_activation_checkpointing_changes_neither_loss_nor_gradient(folder: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = load_model(section(folder), checkpointing)
        assert model.training and model.is_gradient_checkpointing == checkpointing
        assert model.config.use_cache is False
        ids = torch.arange(3, 19).view(2, 8)
        loss = SummedLoss(model)(ids, torch.tensor([0, 9]), torch.tensor([4, 5]))
        loss.backward()
        results.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_a_models_dropout_is_off_and_reported(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    model = SummedLoss(load_model(section(tmp_path / "model"), False))
    batch = torch.arange(3, 19).view(2, 8), torch.tensor([6, 15]), torch.tensor([4, 5])
    assert model.training and torch.equal(model(*batch), model(*batch))
    assert "attention_dropout of its config is set to 0" in caplog.text


def test_weights_load_in_the_dtype_of_the_recipe(folder: Path) -> None:
    assert load_model(section(folder, dtype="bf16"), False).dtype == torch.bfloat16


@pytest.mark.parametrize("load", [lambda p: load_tokenizer(str(p)), lambda p: load_model(section(p), False)])
def test_a_folder_that_is_missing_or_holds_no_model_is_named(load, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.path .*nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no config.json: give the folder of a Hugging Face model"):
        load(tmp_path)


def test_a_folder_whose_config_is_broken_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"model.path .* is no causal language model: "):
        load_model(section(tmp_path), False)


def test_a_base_with_weights_missing_or_cut_short_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lacks 1 weights, the first {name}: give a whole model"):
        load_model(section(tmp_path / "model"), False)
    save_file(weights, file, {"format": "pt"})
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"is no causal language model: "):
        load_model(section(tmp_path / "model"), False)


@pytest.mark.parametrize("change", [{"model_type": "t5"}, {"model_type": "nothing"}, {"hidden_size": "x"}])
def test_a_configuration_of_no_causal_language_model_is_refused(
    change: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model.path .* is no causal language model: "):
        model_without_weights(str(tmp_path))


def test_a_model_folder_without_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ModelError, match=r"holds no tokenizer that transformers can load"):
        load_tokenizer(str(tmp_path))
