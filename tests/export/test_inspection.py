"""`dynrank inspect` on adapters that PEFT wrote, compared with dense matrices, and on damaged ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dynrank_ds.checkpoint.files import write_sums
from dynrank_ds.cli import main
from dynrank_ds.export import export_adapter
from dynrank_ds.export.base_model import model_hash
from dynrank_ds.export.inspection import inspect_adapter
from dynrank_ds.export.peft_config import AdapterConfig

from .conftest import save_base

WEIGHTS = "adapter_model.safetensors"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("inspected") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of PEFT's with mixed ranks and alphas and rsLoRA, and its dW by module."""
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 6, "up_proj": 2},
        alpha_pattern={"layers.0.mlp.up_proj": 9},
    )
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    updates = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            updates[name] = module.get_delta_weight("default").detach()
    folder = tmp_path_factory.mktemp("made") / "adapter"
    model.save_pretrained(folder)
    return folder, updates


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made[0], tmp_path / "adapter")


def test_ranks_scales_norms_and_effective_ranks_are_those_of_pefts_dense_updates(made):
    folder, updates = made
    found = inspect_adapter(folder)
    assert found.defects == [] and {m.name for m in found.modules} == set(updates)
    for module in found.modules:
        singular = torch.linalg.svdvals(updates[module.name].double())
        singular = singular[singular > 1e-5 * singular[0]]  # the dense product has fp32 rounding
        shares = singular / singular.sum()
        entropy = -(shares * shares.log()).sum()
        assert module.rank == len(singular)
        assert module.norm == pytest.approx(float(updates[module.name].double().norm()), rel=1e-6)
        assert module.effective_rank == pytest.approx(float(entropy.exp()), rel=1e-4)
    assert found.parameters == sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    scales = {module.name: module.scale for module in found.modules}
    assert scales["model.layers.0.mlp.up_proj"] == pytest.approx(9 / 2**0.5)
    assert scales["model.layers.1.self_attn.q_proj"] == pytest.approx(5 / 6**0.5)


def test_the_command_prints_ranks_by_layer_and_exits_with_0(made, base, capsys):
    assert main(["inspect", "--adapter", str(made[0]), "--base", str(base)]) == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()]
    assert ["layer", "q_proj", "up_proj"] in table or ["layer", "up_proj", "q_proj"] in table
    assert "no defects" in out and "4 linear layers, total rank 13" in out
    assert "says no hash of the base" in out


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors, whose names are given with __ for dots."""
    stored = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        key = f"base_model.model.{name.replace('__', '.')}"
        if tensor is None:
            del stored[key]
        else:
            stored[key] = tensor
    save_file(stored, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"use_dora": True}, 1),
        ({"modules_to_save": ["lm_head"]}, 1),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 3),
        ({"lora_bias": True}, 1),
        ({"target_modules": "all-linear"}, 0),
        ({"target_modules": r".*\.q_proj"}, 0),
    ],
)
def test_what_else_peft_stores_is_counted_and_no_defect(settings, others, tmp_path):
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    found = inspect_adapter(tmp_path / "adapter", str(base))
    assert found.defects == [] and len(found.other_tensors) == others
    assert len(found.modules) == (7 if settings.get("target_modules") == "all-linear" else 1)


UP_A, UP_B = (f"model__layers__1__mlp__up_proj__lora_{side}__weight" for side in "AB")


@pytest.mark.parametrize(
    ("tensors", "defect"),
    [
        ({UP_B: torch.full((48, 2), torch.nan)}, f"lora_B of {UP} holds NaN"),
        ({UP_A: torch.full((2, 32), torch.inf)}, f"lora_A of {UP} holds infinite values"),
        ({UP_B: None}, f"{UP} has no lora_B"),
        ({UP_B: torch.ones(48, 3)}, f"lora_A (2, 32) and lora_B (48, 3) of {UP} do not fit together"),
        (
            {UP_A: torch.ones(3, 32), UP_B: torch.ones(48, 3)},
            f"{UP} has rank 3, but adapter_config.json says 2",
        ),
        ({UP_B: torch.ones(48, 2, dtype=torch.int8)}, "not a matrix of floating point numbers"),
        (
            {UP_A.replace("A__", "A__default__"): torch.ones(2, 32)},
            f"{UP}.lora_A.weight is stored 2 times, under different names",
        ),
        ({"something": torch.ones(2)}, "base_model.model.something is no name of PEFT's for a LoRA factor"),
    ],
)
def test_a_defect_is_named_and_exits_with_1(copy, tensors, defect, capsys):
    change(copy, **tensors)
    assert main(["inspect", "--adapter", str(copy)]) == 1
    assert defect in capsys.readouterr().out


def test_an_adapter_that_changes_nothing_is_a_defect(copy, capsys):
    stored = load_file(copy / WEIGHTS)
    save_file({k: v * ("lora_A" in k) for k, v in stored.items()}, copy / WEIGHTS)
    assert main(["inspect", "--adapter", str(copy)]) == 1
    assert "the adapter changes nothing" in capsys.readouterr().out


def test_modules_that_the_base_and_the_adapter_do_not_share_are_defects(copy, base, tmp_path):
    change(copy, **{UP_A: None, UP_B: None})
    (defect,) = inspect_adapter(copy, str(base)).defects
    assert defect.startswith(f"{UP} of the base is a target, but the adapter has no tensors for it")
    smaller = save_base(tmp_path / "smaller", num_hidden_layers=1, intermediate_size=40)
    defects = inspect_adapter(copy, str(smaller)).defects
    assert "the base has no linear layer model.layers.1.self_attn.q_proj" in defects
    assert "model.layers.0.mlp.up_proj is (48, 32) in the adapter and (40, 32) in the base" in defects


def test_a_target_without_any_tensor_is_a_defect(copy):
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "down_proj"]}))
    assert inspect_adapter(copy).defects == [
        "target_modules names down_proj, but no tensor belongs to such a module"
    ]


def test_the_base_is_compared_by_hash_with_the_one_of_training(run, tmp_path, capsys):
    shutil.copytree(run.folder / "checkpoints/step-20", tmp_path / "run/checkpoints/step-20")
    state = tmp_path / "run/checkpoints/step-20/state.json"
    identity = {"identity": {"base model": model_hash(run.base)}}
    state.write_text(json.dumps(json.loads(state.read_text()) | identity))
    write_sums(state.parent)
    export_adapter(tmp_path / "run", tmp_path / "adapter", "peft")
    other = shutil.copytree(run.base, tmp_path / "other")
    command = ["inspect", "--adapter", str(tmp_path / "adapter"), "--base"]
    assert main([*command, str(other)]) == 0
    assert "the one it was trained on" in capsys.readouterr().out
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert main([*command, str(other)]) == 1
    assert "it was trained on a base with the hash" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.0\.(self_attn|mlp)\.\w+_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
    ],
)
def test_targets_are_those_of_peft(settings, base):
    config = LoraConfig(**settings)
    ours = AdapterConfig(Path(), json.loads(json.dumps(config.to_dict(), default=list)))
    for name, _ in LlamaForCausalLM.from_pretrained(base).named_modules():
        if name.endswith("_proj"):
            assert ours.is_target(name) == bool(check_target_module_exists(config, name)), name


def damage(folder: Path, kind: str) -> None:
    weights, config = folder / WEIGHTS, folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "missing":
        weights.unlink()
    elif kind == "twice":
        content = weights.read_bytes()
        length = int.from_bytes(content[:8], "little")
        pairs = content[8 : 8 + length].rstrip()[:-1]
        doubled = pairs + b"," + pairs[1:] + b"}"
        weights.write_bytes(len(doubled).to_bytes(8, "little") + doubled + content[8 + length :])
    elif kind == "other":
        config.write_text(json.dumps(settings | {"peft_type": "IA3"}))
    elif kind == "no json":
        config.write_text("{")
    elif kind == "list":
        config.write_text("[]")
    else:
        config.write_text(json.dumps(settings | {"rank_pattern": {"(": 3}}))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("cut", "is cut short"),
        ("empty", "is not a readable safetensors file"),
        ("missing", "does not exist: adapters are read from safetensors files only"),
        ("twice", "a tensor is listed twice"),
        ("other", "peft_type is 'IA3'; only LORA adapters are read"),
        ("no json", "is no JSON"),
        ("list", "holds list, not an object of settings"),
        ("pattern", "rank_pattern has the key '(', no regular expression"),
    ],
)
def test_what_is_no_lora_adapter_is_refused_in_one_sentence(kind, sentence, copy, capsys):
    damage(copy, kind)
    assert main(["inspect", "--adapter", str(copy)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
