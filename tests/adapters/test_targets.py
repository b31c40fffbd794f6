"""Which linear layers a recipe's targets and layers choose, against PEFT's choice, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from dynrank_ds.adapters.targets import describe_targets, find_linears, lost_in_peft
from dynrank_ds.errors import RecipeError
from dynrank_ds.training.architecture import text_decoder
from tests.support.architectures import ARCHITECTURES, architecture_config

LLAVA_TEXT = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAVA_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
}


def model(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture_config(*ARCHITECTURES[name]))


def llava() -> Any:
    heads = {"num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LLAVA_TEXT | heads | {"vocab_size": 100},
        vision_config=LLAVA_TOWER | heads | {"image_size": 28, "patch_size": 14},
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def found(net: Any, targets: Any, layers: Any = None, rank: int = 2) -> dict[str, nn.Linear]:
    return find_linears(net, targets, text_decoder(net), layers, rank)


@pytest.mark.parametrize("name", ["LLaMA", "GPT-NeoX", "Phi-3"])
@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", None),
        (r".*\.1\..*(q_proj|o_proj|qkv_proj|dense)", None),
        (["o_proj", "dense", "layers.0.self_attn.k_proj"], None),
        (["o_proj", "dense"], [1]),
    ],
)
def test_the_choice_is_pefts(name: str, targets: Any, layers: Any) -> None:
    net = model(name)
    if isinstance(targets, list):
        targets = [t for t in targets if any(n.endswith(t) for n, _ in net.named_modules())]
    ours = found(net, targets, layers)
    config = LoraConfig(r=2, target_modules=targets, layers_to_transform=layers, task_type="CAUSAL_LM")
    theirs = get_peft_model(model(name), config).get_base_model()
    assert set(ours) == {n for n, m in theirs.named_modules() if isinstance(m, LoraLayer)}
    assert ours and list(ours) == [n for n, _ in net.named_modules() if n in ours]


def test_all_linear_is_every_linear_of_the_decoder_that_the_rank_fits() -> None:
    net = model("Qwen2-MoE")
    everything = {n for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert everything - set(found(net, "all-linear", rank=1)) == {"lm_head"}
    gates = {n for n in everything if n.endswith("shared_expert_gate")}  # 1 x 32
    assert len(gates) == 2 and everything - set(found(net, "all-linear")) == {"lm_head", *gates}


def test_a_composite_model_is_adapted_in_its_text_decoder_alone() -> None:
    net = llava()
    chosen = found(net, ["q_proj"])
    assert list(chosen) == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert set(found(net, "all-linear")) == {
        n
        for n, m in net.named_modules()
        if isinstance(m, nn.Linear) and n.startswith("model.language_model.")
    }
    assert list(found(net, ["q_proj"], [1])) == ["model.language_model.layers.1.self_attn.q_proj"]
    with pytest.raises(
        RecipeError, match=r"'fc1', which only model.vision_tower.* adapters go into the text decoder"
    ):
        found(net, ["q_proj", "fc1"])


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "lm_head", r".*(q_proj|lm_head)"])
def test_the_output_layer_is_refused(targets: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"adapter.targets names lm_head, the output layer: it cannot be adapted"
    ):
        found(model("LLaMA"), targets)


@pytest.mark.parametrize(
    ("name", "targets", "layers", "sentence"),
    [
        (
            "LLaMA",
            ["q_proj", "qproj"],
            None,
            r"'qproj', but the model has no linear .* it has down_proj, gate",
        ),
        ("LLaMA", ["proj"], None, r"names 'proj', but the model has no linear of that name"),
        ("LLaMA", "q_proj", None, r"'q_proj' matches none of the 14 linear layers.* give a list, \[q_proj\]"),
        ("LLaMA", ["q_proj"], [0, 2], r"names layer 2, but the model's 2 layers are 0 to 1"),
        (
            "Mixtral",
            ["up_proj"],
            None,
            r"fused 3-D parameters \(model.layers.0.mlp.experts.gate_up_proj and 3 more\)",
        ),
        (
            "DeepSeek-V3",
            ["shared_experts.up_proj"],
            [0],
            r"which none of the layers \[0\] of adapter.layers has",
        ),
        ("Falcon-H1", ["mamba.out_proj"], None, r"state-space layer, whose kernel reads the weight alone"),
    ],
)
def test_a_target_that_names_nothing_is_reported_with_the_names_that_exist(
    name: str, targets: Any, layers: Any, sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        found(model(name), targets, layers)


def test_what_is_adapted_and_left_out_is_counted() -> None:
    net = model("Qwen2-MoE")
    assert describe_targets(net, found(net, ["q_proj", "v_proj"])) == (
        "4 linear layers (2 q_proj, 2 v_proj); left out: 2 k_proj, 2 o_proj, 2 gate_proj, 2 up_proj, 2 down_proj, "
        "2 shared_expert_gate, 1 lm_head; not adaptable: experts held as fused 3-D parameters "
        "(2 gate_up_proj, 2 down_proj)"
    )


def test_layers_that_peft_takes_for_experts_are_reported() -> None:
    net = model("DeepSeek-V3")
    lost = lost_in_peft(net, found(net, "all-linear"))
    assert len(lost) == 6 and "model.layers.0.mlp.gate_proj" in lost
    config = LoraConfig(r=2, target_modules=[*found(net, "all-linear")])
    theirs = {n for n, m in get_peft_model(net, config).named_modules() if isinstance(m, LoraLayer)}
    assert not any(n.endswith(tuple(lost)) for n in theirs)
    assert lost_in_peft(model("LLaMA"), ["model.layers.0.mlp.gate_proj"]) == []
