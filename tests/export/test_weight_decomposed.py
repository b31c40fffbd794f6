"""PEFT's DoRA adapters, its own and ours, go through every verb as PEFT has them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from dynrank_ds.checkpoint.files import write_sums
from dynrank_ds.cli import main
from dynrank_ds.export import export_checkpoint, merge_adapter
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.model import adapt
from tests.support.recipes import write_recipe

from .conftest import draw_modules, save_base, save_checkpoint

RANKS = {
    "model.layers.0.self_attn.q_proj": 3,
    "model.layers.0.mlp.down_proj": 0,
    "model.layers.1.mlp.up_proj": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("decomposed") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    """A checkpoint with magnitudes at ranks 3, 0 and 2."""
    folder = base.parent / "run/checkpoints/step-20"
    modules = draw_modules(LlamaForCausalLM.from_pretrained(base), RANKS)
    save_checkpoint(folder, base, modules)
    model, vectors = LlamaForCausalLM.from_pretrained(base), {}
    for name in RANKS:
        norms = model.get_submodule(name).weight.detach().norm(dim=1)
        vectors[f"constant/{name}.base_norms"] = norms
        vectors[f"master/{name}.magnitude_offset"] = 0.3 * torch.rand(len(norms)) * norms
    save_file(load_file(folder / "state.safetensors") | vectors, folder / "state.safetensors")
    write_sums(folder)
    return folder


def decomposed(base: Path, checkpoint: Path) -> LlamaForCausalLM:
    """The base with m / ||W + dW|| (W + dW) in place of W: a plain forward without any adapter."""
    model = LlamaForCausalLM.from_pretrained(base)
    state = load_file(checkpoint / "state.safetensors")
    modules = draw_modules(model, RANKS)
    for name, module in modules.items():
        weight = model.get_submodule(name).weight.data
        magnitude = weight.norm(dim=1) + state[f"master/{name}.magnitude_offset"]
        summed = weight + (module.delta() if len(module.a) else 0)
        weight.copy_(magnitude[:, None] * summed / summed.norm(dim=1, keepdim=True))
    return model


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


def with_peft(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)


def pefts_own(folder: Path, base: Path) -> Path:
    """An adapter of PEFT's whose factors and magnitudes are trained."""
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(len(parameter))
    model.save_pretrained(folder)
    return folder


def test_an_export_has_the_logits_of_the_formula_in_peft_and_merged(
    base: Path, checkpoint: Path, tokens: Tensor, tmp_path: Path
) -> None:
    export_checkpoint(checkpoint, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", None, tmp_path / "merged")
    expected = logits(decomposed(base, checkpoint), tokens)
    peft = with_peft(base, tmp_path / "adapter")
    assert (logits(peft, tokens) - expected).abs().max() < 1e-5
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, tokens) - expected).abs().max() < 1e-5
    assert (logits(LlamaForCausalLM.from_pretrained(base), tokens) - expected).abs().max() > 0.1
    layers = {n for n, m in peft.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert layers == set(RANKS)  # the magnitudes of the module of rank 0 too
    assert "use_dora" in (tmp_path / "adapter/adapter_config.json").read_text()
    assert "serve no magnitudes" in (tmp_path / "adapter/README.md").read_text()


def test_magnitudes_are_fp32_whatever_the_dtype_of_the_factors(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "adapter", dtype="bf16")
    for key, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items():
        assert value.dtype == (torch.float32 if "magnitude" in key else torch.bfloat16)


def test_a_padded_export_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint.parents[1]
    command = ["export", "--run", str(run), "--output", str(tmp_path / "out"), "--format", "padded"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "is weight-decomposed" in err and "merge it" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pefts_own_adapter_is_merged_as_peft_merges_it(base: Path, tmp_path: Path) -> None:
    adapter = pefts_own(tmp_path / "adapter", base)
    merge_adapter(adapter, str(base), tmp_path / "merged")
    expected = with_peft(base, adapter).merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "merged/model.safetensors").items():
        assert (weight - expected[name]).abs().max() < 1e-6


def test_at_another_size_magnitudes_stay(base: Path, tokens: Tensor, tmp_path: Path) -> None:
    adapter = pefts_own(tmp_path / "adapter", base)
    for rank in ("2", "5"):
        command = ["resize", "--adapter", str(adapter), "--output", str(tmp_path / rank), "--rank", rank]
        assert main([*command, "--uniform"]) == 0
    before, fewer, more = (
        load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "2", tmp_path / "5")
    )
    for key, value in before.items():
        if "magnitude" in key:
            assert torch.equal(fewer[key], value) and torch.equal(more[key], value)
    expected = logits(with_peft(base, adapter), tokens)
    assert (logits(with_peft(base, tmp_path / "5"), tokens) - expected).abs().max() < 1e-5
    assert (logits(with_peft(base, tmp_path / "2"), tokens) - expected).abs().max() > 1e-3


def test_a_run_starts_with_the_function_of_pefts_adapter(tmp_path: Path) -> None:
    """At three more targets than the adapter has; those begin with the base's magnitudes."""
    recipe, base = write_recipe(tmp_path), tmp_path / "model"
    adapter = pefts_own(tmp_path / "adapter", base)
    tokens = torch.randint(3, 90, (2, 12))
    expected = logits(with_peft(base, adapter), tokens)
    (tmp_path / "lora.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": {"name": "lora"}}))
    overrides = [f"adapter.init_from={adapter}", "adapter.weight_decomposed=true"]
    for file in (tmp_path / "lora.yaml", recipe):
        model = LlamaForCausalLM.from_pretrained(base)
        adapt(model, load_recipe(str(file), overrides))
        assert (logits(model, tokens) - expected).abs().max() < 1e-5
    # A plain adapter's function, too: its magnitudes are those that it has.
    shutil.rmtree(adapter)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    plain = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    plain.save_pretrained(adapter)
    model = LlamaForCausalLM.from_pretrained(base)
    adapt(model, load_recipe(str(recipe), overrides))
    assert (logits(model, tokens) - logits(plain, tokens)).abs().max() < 1e-5


def test_a_decomposed_adapter_is_no_start_for_a_plain_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    adapter = pefts_own(tmp_path / "adapter", tmp_path / "model")
    assert main(["validate", "--recipe", str(recipe), f"adapter.init_from={adapter}"]) == 2
    assert "set adapter.weight_decomposed to true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        (lambda t: t[:-1], r"are \(31,\), not one for each of 32 rows"),
        (lambda t: t * torch.nan, "hold NaN or infinite values"),
        (None, "has no magnitudes, but adapter_config.json says use_dora"),
    ],
)
def test_inspect_finds_magnitudes_that_are_wrong_and_merge_refuses_them(
    change: object, defect: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = pefts_own(tmp_path / "adapter", base)
    assert main(["inspect", "--adapter", str(adapter), "--base", str(base)]) == 0
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "magnitude" in key and "q_proj" in key)
    value = tensors.pop(key)
    save_file(tensors | ({} if change is None else {key: change(value).contiguous()}), file)
    capsys.readouterr()
    assert main(["inspect", "--adapter", str(adapter), "--base", str(base)]) == 1
    out = capsys.readouterr().out
    assert any(line.startswith("defect") and re.search(defect, line) for line in out.splitlines()), out
    command = ["merge", "--adapter", str(adapter), "--base", str(base), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert not (tmp_path / "out").exists()


def test_heads_have_no_magnitudes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "heads.yaml").write_text(
        json.dumps({"base": "recipe.yaml", "method": {"name": "ard_lora", "t_i": 2, "interval": 4, "t_f": 5}})
    )
    assert main(["validate", "--recipe", str(tmp_path / "heads.yaml"), "adapter.weight_decomposed=true"]) == 2
    err = capsys.readouterr().err
    assert (
        "whose modules are attention heads: variants are of whole linear layers" in err and recipe.is_file()
    )
