from __future__ import annotations

from typing import Literal

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dynrank_ds.adapters.initial import lora_factors, module_generator, svd_factors
from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.errors import RecipeError
from dynrank_ds.recipe_sections import AdapterSection
from tests.support.named import inject_named


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(12, 5)
        self.norm = nn.LayerNorm(8)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()]), "head": nn.Linear(8, 20)}).to(dtype)


def test_only_the_targets_are_adapted_and_the_base_is_frozen() -> None:
    net = model()
    modules = inject_named(net, ["q_proj"], rank=4, scale=2.0, init=svd_factors, seed=0)
    assert list(modules) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert [n for n, m in net.named_modules() if isinstance(m, AdaptedLinear)] == list(modules)
    assert all(net.get_submodule(name) is module and module.scale == 2.0 for name, module in modules.items())
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{b}.{f}" for b in modules for f in ("lora_A", "lora_E", "lora_B")}


def test_factors_follow_the_seed_and_the_module_name_in_the_dtype_of_the_base() -> None:
    all_targets = inject_named(model(torch.bfloat16), ["q_proj", "down_proj"], 3, 1.0, svd_factors, seed=7)
    alone = inject_named(model(torch.bfloat16), ["down_proj"], 3, 1.0, svd_factors, seed=7)
    name = "layers.1.down_proj"
    expected = svd_factors(3, 12, 5, module_generator(7, name, 0))
    for factor, value in alone[name].factors().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[factor].bfloat16())
        assert torch.equal(value, all_targets[name].factors()[factor])


@pytest.mark.parametrize(("scaling", "root"), [("rank", False), ("root_rank", True)])
def test_the_scale_is_that_of_peft_with_and_without_rslora(
    scaling: Literal["rank", "root_rank"], root: bool
) -> None:
    section = AdapterSection(rank=3, alpha=5.0, scaling=scaling, targets=("q_proj",))
    assert section.alpha is not None
    scale = section.alpha / section.alpha_at_scale_one
    ours = inject_named(model(), section.targets, section.rank, scale, lora_factors, seed=0)
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=root, target_modules=["q_proj"])  # type: ignore[arg-type]
    theirs = inject_adapter_in_model(config, model())
    for name, module in ours.items():
        assert module.scale == pytest.approx(theirs.get_submodule(name).scaling["default"], rel=1e-12)


def test_a_rank_above_a_side_is_refused_with_the_module_and_its_shape() -> None:
    with pytest.raises(RecipeError, match=r"adapter.rank is 6, but layers.0.down_proj is 5 x 12: at most 5"):
        inject_named(model(), ["q_proj", "down_proj"], 6, 2.0, svd_factors, 0)
