import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dynrank_ds.checkpoint.files import write_sums
from dynrank_ds.errors import RunError
from dynrank_ds.export import export_adapter, export_checkpoint

from .conftest import AdaptedModule, draw_modules, save_checkpoint


def load_with_peft(run, adapter) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter)


def adapted(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("format", ["peft", "padded"])
def test_peft_gives_the_logits_of_the_trained_model(run, tokens, tmp_path, format):
    export_adapter(run.folder, tmp_path / "adapter", format)
    with torch.no_grad():
        expected = run.model()(tokens).logits
        found = load_with_peft(run, tmp_path / "adapter")(tokens).logits
        base = LlamaForCausalLM.from_pretrained(run.base)(tokens).logits
    assert (found - expected).abs().max() < 1e-5
    assert (base - expected).abs().max() > 0.1


def test_peft_sees_every_rank_and_scale_and_no_module_of_rank_0(run, tmp_path):
    export_adapter(run.folder, tmp_path / "adapter", "peft")
    modules = adapted(load_with_peft(run, tmp_path / "adapter").base_model.model)
    assert set(modules) == {name for name, module in run.modules.items() if len(module.a)}
    for name, module in modules.items():
        assert module.r["default"] == len(run.modules[name].a)
        assert module.scaling["default"] == pytest.approx(run.modules[name].scale, rel=1e-15)


def test_padded_has_one_rank_and_zeros_where_the_rank_was_0(run, tmp_path):
    export_adapter(run.folder, tmp_path / "adapter", "padded")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert (
        config["r"] == config["lora_alpha"] == 6
        and not config["rank_pattern"]
        and not config["alpha_pattern"]
    )
    assert len(tensors) == 2 * len(run.modules)
    for name, module in run.modules.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == 6 and a.dtype == b.dtype == torch.float32
        assert not a[len(module.a) :].any() and not b[:, len(module.a) :].any()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_factors_are_stored_in_the_dtype_asked_for(name, dtype, run, tmp_path):
    export_adapter(run.folder, tmp_path / "wide")
    export_adapter(run.folder, tmp_path / "narrow", dtype=name)
    wide = load_file(tmp_path / "wide/adapter_model.safetensors")
    for key, factor in load_file(tmp_path / "narrow/adapter_model.safetensors").items():
        assert torch.equal(factor, wide[key].to(dtype))


def test_a_value_beyond_the_range_of_fp16_is_refused(tmp_path):
    checkpoint = one_module(tmp_path / "checkpoints", b=torch.full((2, 3), 7e4))
    with pytest.raises(RunError, match=r"lora_B of proj has values beyond the range of torch\.float16"):
        export_checkpoint(checkpoint, tmp_path / "adapter", dtype="fp16")
    assert not (tmp_path / "adapter").exists()


def test_a_name_that_ends_another_name_keeps_its_own_rank(tmp_path):
    """PEFT matches pattern keys as dotted suffixes, the first key wins."""
    modules = {
        "net.0": AdaptedModule(torch.ones(1, 4), None, torch.ones(1, 4), 1.0),
        "outer.net.0": AdaptedModule(torch.ones(3, 4), None, torch.ones(3, 4), 2.0),
    }
    save_checkpoint(tmp_path / "step-1", tmp_path, modules)
    export_checkpoint(tmp_path / "step-1", tmp_path / "adapter")
    model = torch.nn.Module()
    model.net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.outer = torch.nn.Module()
    model.outer.net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    injected = inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path / "adapter"), model)
    modules = adapted(injected)
    assert {name: module.r["default"] for name, module in modules.items()} == {"net.0": 1, "outer.net.0": 3}
    assert {name: module.scaling["default"] for name, module in modules.items()} == {
        "net.0": 1,
        "outer.net.0": 2,
    }


def test_lora_of_one_rank_needs_no_patterns(run, tmp_path, tokens):
    model = LlamaForCausalLM.from_pretrained(run.base)
    modules = draw_modules(model, dict.fromkeys(run.modules, 3), with_e=False)
    for module in modules.values():
        module.scale = 2.0
    save_checkpoint(tmp_path / "step-5", run.base, modules, method="lora")
    export_checkpoint(tmp_path / "step-5", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        3,
        6,
        {},
        {},
    )
    with torch.no_grad():
        for name, module in modules.items():
            model.get_submodule(name).weight += module.delta()
        found = load_with_peft(run, tmp_path / "adapter")(tokens).logits
        assert (found - model(tokens).logits).abs().max() < 1e-5


def one_module(tmp_path, **changes):
    values = dict(a=torch.ones(2, 4), e=torch.ones(2), b=torch.ones(2, 3), scale=1.0) | changes
    save_checkpoint(tmp_path / "step-1", tmp_path, {"proj": AdaptedModule(**values)})
    return tmp_path / "step-1"


@pytest.mark.parametrize("format", ["peft", "padded"])
@pytest.mark.parametrize(
    "changes",
    [{"e": torch.zeros(2)}, {"b": torch.zeros(2, 3)}, {"a": torch.ones(0, 4), "b": torch.ones(0, 3)}],
)
def test_an_adapter_that_changes_nothing_is_refused(tmp_path, changes, format):
    one_module(tmp_path / "checkpoints", **changes)
    with pytest.raises(RunError, match="changes nothing"):
        export_adapter(tmp_path, tmp_path / "adapter", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


@pytest.mark.parametrize("factor", ["a", "e", "b"])
def test_a_value_that_is_not_finite_is_named(tmp_path, factor):
    shape = {"a": (2, 4), "e": (2,), "b": (2, 3)}[factor]
    checkpoint = one_module(tmp_path, **{factor: torch.full(shape, torch.nan)})
    with pytest.raises(RunError, match=f"master/proj.lora_{factor.upper()} has values that are not finite"):
        export_checkpoint(checkpoint, tmp_path / "adapter")


def test_a_missing_or_damaged_checkpoint_is_reported(tmp_path):
    with pytest.raises(RunError, match="no complete checkpoint"):
        export_adapter(tmp_path, tmp_path / "adapter", "peft")
    with pytest.raises(RunError, match="is damaged"):
        export_checkpoint(tmp_path, tmp_path / "adapter")
    checkpoint = one_module(tmp_path)
    state = json.loads((checkpoint / "state.json").read_text())
    weights = checkpoint / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunError, match="is damaged: state"):
        export_checkpoint(checkpoint, tmp_path / "adapter")
    rewrite_state(checkpoint, state | {"format": 1})
    with pytest.raises(RunError, match="has format 1: this version reads format 2"):
        export_checkpoint(checkpoint, tmp_path / "adapter")


def rewrite_state(checkpoint, state):
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_sums(checkpoint)


def test_a_checkpoint_that_disagrees_with_its_description_is_refused(tmp_path):
    checkpoint = one_module(tmp_path)
    state = json.loads((checkpoint / "state.json").read_text())
    state["blocks"]["proj"]["rank"] = 3
    rewrite_state(checkpoint, state)
    with pytest.raises(RunError, match=r"master/proj\.lora_A is .*state\.json says"):
        export_checkpoint(checkpoint, tmp_path / "adapter")
    state["blocks"]["other"] = state["blocks"].pop("proj")
    rewrite_state(checkpoint, state)
    with pytest.raises(RunError, match=r"lacks the tensor master/other\.lora_A"):
        export_checkpoint(checkpoint, tmp_path / "adapter")


def test_an_earlier_export_is_replaced_and_anything_else_is_kept(tmp_path):
    checkpoint = one_module(tmp_path)
    output = tmp_path / "adapter"
    export_checkpoint(checkpoint, output)
    export_checkpoint(checkpoint, output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes\.txt"):
        export_checkpoint(checkpoint, output)
    assert (output / "notes.txt").read_text() == "mine"
    shutil.rmtree(output)
    output.write_text("a file")
    with pytest.raises(RunError, match="is a file"):
        export_checkpoint(checkpoint, output)
