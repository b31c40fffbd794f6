import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from dynrank_ds.errors import ModelError, RunError
from dynrank_ds.export import export_adapter, merge_adapter

from .conftest import save_base, tiny_config


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "adapter"
    export_adapter(run.folder, folder, "peft")
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("format", ["peft", "padded"])
def test_merged_model_gives_the_logits_of_the_trained_one(run, tokens, tmp_path, format):
    export_adapter(run.folder, tmp_path / "adapter", format)
    merge_adapter(tmp_path / "adapter", None, tmp_path / "merged")
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (model(tokens).logits - run.model()(tokens).logits).abs().max() < 1e-5


def test_a_sharded_bf16_base_keeps_files_index_and_dtype(run, adapter, tmp_path):
    base = save_base(tmp_path / "base", torch.bfloat16, shard="100KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    merge_adapter(adapter, str(base), tmp_path / "merged")
    merged = tmp_path / "merged"
    expected = [path.name for path in base.iterdir() if path.suffix != ".py"] + ["dynrank.json"]
    assert sorted(path.name for path in merged.iterdir()) == sorted(expected)
    for name in ("model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    for shard in shards:
        before, after = load_file(base / shard), load_file(merged / shard)
        assert set(before) == set(after)
        for key, weight in before.items():
            module = run.modules.get(key.removesuffix(".weight"))
            wanted = weight if module is None else (weight.float() + module.delta()).to(torch.bfloat16)
            assert after[key].dtype == torch.bfloat16
            # One unit in the last place where fp32 sums of another order meet a rounding boundary.
            assert torch.allclose(after[key].float(), wanted.float(), rtol=2**-7, atol=1e-6)
            if module is None or len(module.a) == 0:
                assert torch.equal(after[key], weight)
    with safe_open(merged / shards[0], framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_pefts_own_merges_as_peft_does(run, tmp_path, rslora):
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 9, r"layers\.\d+\.mlp\.down_proj": 2},
        alpha_pattern={"1.mlp.down_proj": 3},
        use_rslora=rslora,
        init_lora_weights="gaussian",
    )
    torch.manual_seed(3)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(run.base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", str(run.base), tmp_path / "merged")
    fresh = LlamaForCausalLM.from_pretrained(run.base)
    expected = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = weights(tmp_path / "merged")
    for key, weight in merged.items():
        assert (weight - expected[key]).abs().max() < 1e-6
    assert set(merged) == set(load_file(run.base / "model.safetensors"))


def test_tied_embeddings_stay_as_they_are(run, adapter, tmp_path, tokens):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    merge_adapter(adapter, str(base), tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert set(before) == set(after)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure peak memory"
)
def test_memory_stays_at_the_largest_tensor(tmp_path):
    """Four weights of 96 MiB: a merge that holds two of them at a time would show."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    size, mib = 4096, 1 << 20
    large = {f"layers.{i}.weight": torch.full((3 * size, size), 0.5, dtype=torch.bfloat16) for i in range(4)}
    save_file(large, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    factors = {}
    for i in range(4):
        factors[f"base_model.model.layers.{i}.lora_A.weight"] = torch.ones(2, size)
        factors[f"base_model.model.layers.{i}.lora_B.weight"] = torch.ones(3 * size, 2)
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    script = f"""
        from pathlib import Path
        from dynrank_ds.export import merge_adapter
        def peak_kib():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the parent's, too: start anew
        before = peak_kib()
        merge_adapter(Path({str(adapter)!r}), {str(base)!r}, Path({str(tmp_path / "merged")!r}))
        print((peak_kib() - before) * 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 96 * mib < growth < (96 + 80) * mib, f"grew by {growth / mib:.0f} MiB"
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(weight, torch.full_like(weight, 1.5)) for weight in merged.values())


def write_adapter(folder, config=None, tensors=None):
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(plain | (config or {})))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    default = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    save_file(default if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_dora": True}, "has no magnitudes of .* says use_dora"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"r": 3}, r"has rank 2, but adapter_config\.json says 3"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(run, tmp_path, config, sentence):
    adapter = write_adapter(tmp_path / "adapter", config)
    with pytest.raises(RunError, match=sentence):
        merge_adapter(adapter, str(run.base), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 4)}, "lora_embedding_A"),
        ({"base_model.model.x.lora_A.weight": torch.ones(2, 4)}, "only one of lora_A and lora_B of x"),
        ({"base_model.model.x.lora_B.weight": torch.ones(2, 4)}, "only one of lora_A and lora_B of x"),
        ({}, "no LoRA tensors"),
    ],
)
def test_tensors_that_are_no_pairs_of_factors_are_refused(run, tmp_path, tensors, sentence):
    adapter = write_adapter(tmp_path / "adapter", tensors=tensors)
    with pytest.raises(RunError, match=sentence):
        merge_adapter(adapter, str(run.base), tmp_path / "merged")


def factors(name, out_features, in_features, value=1.0):
    key = f"base_model.model.{name}"
    a, b = torch.ones(2, in_features), torch.full((out_features, 2), value)
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("tensors", "kind", "sentence"),
    [
        (
            factors("model.layers.99.mlp.up_proj", 48, 32),
            ModelError,
            r"no weight model\.layers\.99\.mlp\.up_proj",
        ),
        (
            factors("model.layers.0.mlp.up_proj", 32, 32),
            ModelError,
            r"shape \(48, 32\), the adapter's module",
        ),
        (factors("model.layers.0.mlp.up_proj", 48, 32, 0.0), RunError, "changes nothing"),
        (factors("model.layers.0.mlp.up_proj", 48, 32, 1e-12), RunError, "changes nothing"),
        (
            factors("model.layers.0.mlp.up_proj", 48, 32, torch.inf),
            RunError,
            "lora_B.weight has values that are not",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_or_work_is_refused(run, tmp_path, tensors, kind, sentence):
    adapter = write_adapter(tmp_path / "adapter", tensors=tensors)
    with pytest.raises(kind, match=sentence):
        merge_adapter(adapter, str(run.base), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_that_cannot_be_used_is_reported(run, tmp_path, adapter):
    plain = write_adapter(tmp_path / "adapter")
    with pytest.raises(RunError, match="does not name its base model"):
        merge_adapter(plain, None, tmp_path / "merged")
    with pytest.raises(ModelError, match="could not be fetched from the hub"):
        merge_adapter(plain, "nobody/has-this-model", tmp_path / "merged")
    with pytest.raises(ModelError, match="is no folder"):
        merge_adapter(plain, "/no/such/folder", tmp_path / "merged")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        merge_adapter(plain, str(tmp_path), tmp_path / "merged")
    base = save_base(tmp_path / "sharded", shard="100KB")
    next(base.glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="which is not in"):
        merge_adapter(plain, str(base), tmp_path / "merged")
    (base / "model.safetensors.index.json").write_text("{")
    with pytest.raises(RunError, match=r"index\.json is no JSON"):
        merge_adapter(plain, str(base), tmp_path / "merged")
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="only safetensors weights"):
        merge_adapter(plain, str(base), tmp_path / "merged")


def test_an_int8_weight_is_refused(tmp_path, run):
    adapter = write_adapter(tmp_path / "adapter", tensors=factors("proj", 4, 4))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file({"proj.weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "base/model.safetensors")
    with pytest.raises(ModelError, match=r"stored as torch\.int8"):
        merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "merged")


def test_a_changed_output_head_of_tied_embeddings_is_refused(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", tensors=factors("lm_head", 4, 4))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"tie_word_embeddings": true}')
    save_file({"lm_head.weight": torch.ones(4, 4)}, tmp_path / "base/model.safetensors")
    with pytest.raises(ModelError, match="ties lm_head"):
        merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "merged")


def test_importing_the_room_does_not_import_deepspeed():
    script = (
        "import sys, dynrank_ds.export; sys.exit('deepspeed' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_names_that_transformers_changes_on_loading_are_found(prefix, tmp_path):
    """A text model saved without its output layer's class, and a composite model of either layout."""
    torch.manual_seed(0)
    if prefix:
        text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        tower = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48}
        heads = {"num_attention_heads": 4, "num_hidden_layers": 1}
        config = LlavaConfig(
            text_config=text | heads | {"vocab_size": 64},
            vision_config=tower | heads | {"image_size": 28, "patch_size": 14},
        )
        model, module = (
            LlavaForConditionalGeneration(config),
            "model.language_model.layers.0.self_attn.q_proj",
        )
        saved = (module, f"{prefix}layers.0.self_attn.q_proj")
    else:
        model = LlamaForCausalLM(tiny_config(num_hidden_layers=1, tie_word_embeddings=True))
        module = "model.layers.0.self_attn.q_proj"
        saved = (module, "layers.0.self_attn.q_proj")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    old = "language_model.model." if prefix else "model."
    tensors = {
        (prefix + name.removeprefix(old) if name.startswith(old) else name): value
        for name, value in tensors.items()
    }
    assert f"{saved[1]}.weight" in tensors
    save_file(tensors, file, {"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", {"target_modules": [module]}, factors(module, 32, 32))
    merge_adapter(adapter, str(tmp_path / "base"), tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with_peft = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), adapter)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = with_peft(input_ids=tokens).logits
        assert (merged(input_ids=tokens).logits - expected).abs().max() < 1e-5
        assert (model(input_ids=tokens).logits - expected).abs().max() > 1e-3
