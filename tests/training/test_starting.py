"""Runs that start from a PEFT adapter, or with ranks of their own for single modules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from dynrank_ds.cli import main
from dynrank_ds.errors import RecipeError
from dynrank_ds.export import export_adapter
from dynrank_ds.methods import build_method
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.model import adapt
from dynrank_ds.training.starting import warn_of_another_base
from tests.support.launch import train
from tests.support.methods import METHODS
from tests.support.recipes import lines, write_recipe

PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"layers.1.self_attn.q_proj": 6, "down_proj": 2},
    "alpha_pattern": {"layers.0.mlp.down_proj": 9},
}


def write_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter of PEFT's with trained values, by default on three kinds of layers."""
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**values))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    model.save_pretrained(folder)
    return folder


def updates(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def changed(recipe: Path, name: str, adapter: dict[str, Any], **sections: Any) -> Path:
    values = yaml.safe_load(recipe.read_text()) | sections
    values["adapter"] |= adapter
    values["output"] = {"dir": str(recipe.parent / name)}
    (recipe.parent / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return recipe.parent / f"{name}.yaml"


TOKENS = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_with_the_logits_of_pefts_adapter(name: str, recipe: Path) -> None:
    base = recipe.parent / "model"
    uniform = {"target_modules": "all-linear", "r": 4} if name == "ard_lora" else PATTERNS
    adapter = write_adapter(recipe.parent / "adapter", base, **uniform)
    method = METHODS[name] | ({"target_rank": 1} if name in ("adalora", "dynamic_dora", "squeeze") else {})
    read = load_recipe(str(changed(recipe, "run", {"init_from": str(adapter)}, method=method)))
    model = LlamaForCausalLM.from_pretrained(base)
    modules = adapt(model, read)
    build_method(read.method, modules, 40, torch.device("cpu"))
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    plain = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = peft(TOKENS).logits
        assert (model(TOKENS).logits - expected).abs().max() < 1e-5
        assert (plain(TOKENS).logits - expected).abs().max() > 0.01
    assert all(module.initial_rank == len(module.factors().get("lora_A", ())) for module in modules.values())


def test_padded_modules_lose_their_padding(recipe: Path) -> None:
    base = recipe.parent / "model"
    adapter = write_adapter(recipe.parent / "adapter", base, **PATTERNS)
    lora = {"name": "lora"}
    quiet = {"steps": 1, "global_batch_size": 6, "micro_batch_size": 1, "learning_rate": 1e-12}
    run = changed(recipe, "run", {"init_from": str(adapter)}, method=lora, train=quiet)
    train(1, run)
    export_adapter(recipe.parent / "run", recipe.parent / "padded", "padded")
    again = load_recipe(
        str(changed(recipe, "again", {"init_from": str(recipe.parent / "padded")}, method=lora))
    )
    ranks = {n: m.initial_rank for n, m in adapt(LlamaForCausalLM.from_pretrained(base), again).items()}
    assert ranks["model.layers.1.self_attn.q_proj"] == 6 and ranks["model.layers.0.mlp.down_proj"] == 2
    assert ranks["model.layers.0.mlp.up_proj"] == 0
    # One step with a learning rate of almost 0 and an export change no update.
    expected, found = updates(base, adapter), updates(base, recipe.parent / "run/adapter")
    assert set(found) == set(expected)
    assert all((found[name] - dw).abs().max() < 1e-6 for name, dw in expected.items())


def test_a_fixed_rank_run_goes_on_as_a_dynamic_one_and_resumes_without_its_adapter(recipe: Path) -> None:
    base, folder = recipe.parent / "model", recipe.parent
    write_adapter(folder / "adapter", base, **PATTERNS)
    run = changed(recipe, "run", {"init_from": str(folder / "adapter")})
    train(2, run, "train.checkpoint_interval=8", "train.checkpoints_kept=9")
    losses = [line["loss"] for line in lines(folder / "run/metrics.jsonl")]
    first = lines(folder / "run/ranks.jsonl")[0]
    assert first["before"]["model.layers.1.self_attn.q_proj"] == 6
    assert first["before"]["model.layers.0.mlp.up_proj"] == 1  # PE-DyRA needs a triple in every module
    assert any(line["before"] != line["after"] for line in lines(folder / "run/ranks.jsonl"))
    for gone in ("adapter", "run/adapter", "run/checkpoints/step-16", "run/checkpoints/step-20"):
        shutil.rmtree(folder / gone)
    train(1, run, "train.checkpoint_interval=8", "train.checkpoints_kept=9", "resume=auto")
    again = [line["loss"] for line in lines(folder / "run/metrics.jsonl")]
    assert len(again) == len(losses) == 20
    assert max(abs(a - b) for a, b in zip(again, losses, strict=True)) < 1e-6


def test_ranks_of_single_modules_are_those_of_the_recipe(recipe: Path) -> None:
    ranks = {"q_proj": 2, "layers.1.self_attn.q_proj": 5, "model.layers.0.mlp.up_proj": 0}
    read = load_recipe(str(changed(recipe, "run", {"ranks": ranks}, method={"name": "lora"})))
    modules = adapt(LlamaForCausalLM.from_pretrained(recipe.parent / "model"), read)
    found = {name: module.initial_rank for name, module in modules.items()}
    assert found["model.layers.0.self_attn.q_proj"] == 2 and found["model.layers.1.self_attn.q_proj"] == 5
    assert found["model.layers.0.mlp.up_proj"] == 0 and found["model.layers.1.mlp.up_proj"] == 4
    assert {module.scale for module in modules.values()} == {16 / 4}
    assert not modules["model.layers.0.mlp.up_proj"].factors()


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"init_from": "nowhere"}, "adapter.init_from: nowhere/adapter_config.json does not exist"),
        (
            {"init_from": "ADAPTER", "targets": ["q_proj"]},
            "which is none of the 2 layers that adapter.targets",
        ),
        (
            {"init_from": "ADAPTER", "max_rank": 4},
            "has rank 6 in model.layers.1.self_attn.q_proj, above its largest",
        ),
        ({"init_from": "ADAPTER", "ranks": {"q_proj": 2}}, "adapter.ranks is given with adapter.init_from"),
        (
            {"ranks": {"query": 2}},
            "adapter.ranks names 'query', which is none of the 14 adapted linear layers",
        ),
        ({"ranks": {"q_proj": 0}}, "adapter.ranks gives q_proj rank 0: the method needs at least 1"),
        ({"ranks": {"q_proj": 50}}, "adapter.rank is 50, but model.layers.0.self_attn.q_proj is 36 x 36"),
        ({"ranks": {"q_proj": 9}, "max_rank": 8}, "adapter.max_rank 8 is below adapter.ranks of q_proj"),
    ],
)
def test_what_does_not_fit_is_refused_by_validate(
    adapter: dict[str, Any], sentence: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if adapter.get("init_from") == "ADAPTER":
        folder = write_adapter(recipe.parent / "adapter", recipe.parent / "model", **PATTERNS)
        adapter = adapter | {"init_from": str(folder)}
    capsys.readouterr()
    assert main(["validate", "--recipe", str(changed(recipe, "run", adapter))]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.rstrip().count("\n") == 0


def test_an_adapter_of_another_model_is_refused(recipe: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", recipe.parent / "model")
    read = load_recipe(str(changed(recipe, "run", {"init_from": str(adapter)})))
    config = LlamaForCausalLM.from_pretrained(recipe.parent / "model").config
    config.hidden_size, config.intermediate_size = 40, 44
    with pytest.raises(RecipeError, match="is it an adapter of this model"):
        adapt(LlamaForCausalLM(config), read)


def test_an_adapter_that_was_trained_on_another_base_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_another_base(tmp_path, "abc")
    (tmp_path / "dynrank.json").write_text('{"base_model_hash": "abc"}')
    warn_of_another_base(tmp_path, "abc")
    assert not caplog.records
    warn_of_another_base(tmp_path, "xyz")
    assert "was trained on another base than model.path" in caplog.text
