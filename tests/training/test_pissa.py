"""PiSSA on one process without DeepSpeed, against PEFT's own, and against a residual base that is written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.adapters.pissa import PissaLinear
from dynrank_ds.adapters.principal import principal_triples
from dynrank_ds.errors import RecipeError
from dynrank_ds.integrations.hf import DynamicRankCallback
from dynrank_ds.recipe import Recipe, check_recipe
from dynrank_ds.training.model import adapt
from tests.support.tiny import write_model

RANK, ALPHA = 4, 6.0
TARGETS = ["q_proj", "v_proj", "down_proj"]


def recipe(folder: Path, method: dict[str, Any] | None = None, **adapter: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "fp32"},
        "data": {"source": "none"},
        "adapter": {"rank": RANK, "alpha": ALPHA, "init": "pissa", "targets": TARGETS} | adapter,
        "method": method or {"name": "lora"},
        "train": {"steps": 1, "global_batch_size": 1, "learning_rate": 1e-3},
        "output": {"dir": "none"},
    }
    return check_recipe(values, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pissa") / "model")


def base(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def adapted(folder: Path) -> tuple[PreTrainedModel, dict[str, PissaLinear]]:
    model = base(folder)
    modules = {}
    for name, module in adapt(model, recipe(folder)).items():
        assert isinstance(module, PissaLinear)
        found = principal_triples(module.base.weight.detach(), RANK, module_generator(0, name, 0))
        factors = found.factors(module.scale, with_gate=False)
        module.set_factors(factors)
        module.set_initial(factors, range(RANK))
        modules[name] = module
    return model, modules


def of_peft(folder: Path) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="pissa")  # type: ignore[arg-type]
    model = get_peft_model(base(folder), config)
    assert isinstance(model, PeftModel)
    return model


def theirs(model: PeftModel, name: str, side: str) -> nn.Parameter:
    weight = model.base_model.model.get_submodule(f"{name}.lora_{side}.default").weight
    assert isinstance(weight, nn.Parameter)
    return weight


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def signs(ours: Tensor, other: Tensor) -> Tensor:
    """Of each triple, (r, 1): singular vectors have any sign."""
    return (ours * other).sum(1, keepdim=True).sign()


def test_initial_triples_are_pefts(folder: Path) -> None:
    _, modules = adapted(folder)
    peft = of_peft(folder)
    assert len(modules) == 6
    for name, module in modules.items():
        assert module.initial_A is not None and module.initial_B is not None
        a, b = theirs(peft, name, "A").detach(), theirs(peft, name, "B").detach().T
        sign = signs(module.initial_A, a)
        torch.testing.assert_close(module.initial_A.detach(), a * sign, rtol=0, atol=1e-5)
        torch.testing.assert_close(module.initial_B.detach(), b * sign, rtol=0, atol=1e-5)


def test_logits_and_gradients_are_pefts(folder: Path) -> None:
    model, modules = adapted(folder)
    peft = of_peft(folder)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, module in modules.items():
            for side, ours in (("A", module.lora_A), ("B", module.lora_B)):
                other = theirs(peft, name, side)
                assert ours is not None
                rows = other if side == "A" else other.T
                step = 0.05 * torch.randn(ours.shape, generator=draw)
                rows += step
                ours += step * signs(ours, rows)
    logits, expected = model(input_ids=tokens()).logits, peft(input_ids=tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    (logits.log_softmax(-1)[..., 5].mean()).backward()
    (expected.log_softmax(-1)[..., 5].mean()).backward()
    for name, module in modules.items():
        for side, ours in (("A", module.lora_A), ("B", module.lora_B)):
            assert ours is not None and ours.grad is not None
            other = theirs(peft, name, side)
            rows = (other, other.grad) if side == "A" else (other.T, other.grad.T)  # type: ignore[union-attr]
            assert rows[1] is not None and rows[1].abs().max() > 1e-4
            torch.testing.assert_close(ours.grad, rows[1] * signs(ours, rows[0]), rtol=0, atol=1e-5)


def error(output: Tensor, exact: Tensor) -> float:
    """Relative, in Frobenius norm."""
    return float((output.detach().double() - exact).norm() / exact.norm())


def in_nf4(weight: Tensor) -> Tensor:
    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.dtype)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
@pytest.mark.parametrize("trained", [0.0, 1e-2, 1e-1])
def test_subtracting_in_the_forward_against_a_residual_base_that_is_written_anew(
    kind: str, trained: float
) -> None:
    """Errors against fp64 arithmetic on W and the same triples in bf16; `trained` is the change of the factors.

    In bf16 nothing of W is rounded again. An NF4 base keeps the error that it has: a residual base, quantised without
    the principal part of W, has another.
    """
    draw, dtype = torch.Generator().manual_seed(0), torch.bfloat16
    weight = torch.randn(256, 256, generator=draw) * 0.05
    weight += torch.randn(256, 8, generator=draw) @ torch.randn(8, 256, generator=draw) * 0.05
    weight = weight.to(dtype)
    found = principal_triples(weight.float(), 8, draw).factors(2.0, with_gate=False)
    change = {
        f: value + trained * value.std() * torch.randn(value.shape, generator=draw)
        for f, value in found.items()
    }
    rows = [{f: value.to(dtype).double() for f, value in some.items()} for some in (change, found)]
    products = [2.0 * some["lora_B"].T @ some["lora_A"] for some in rows]
    x = torch.randn(512, 256, generator=draw).to(dtype)
    exact = x.double() @ (weight.double() + products[0] - products[1]).T

    stored = in_nf4 if kind == "nf4" else torch.Tensor.clone
    module = PissaLinear(linear(stored(weight)), 2.0)
    module.set_factors(change)
    module.set_initial(found, range(8))
    of_base = error(module.base(x), x.double() @ weight.double().T)
    subtracted = error(module(x), exact)
    if not trained:
        assert torch.equal(module(x), module.base(x))
    module.base = linear(stored((weight.double() - products[1]).to(dtype)))
    module.set_initial({}, [None] * 8)
    rewritten = error(module(x), exact)
    # What the adapters' README says of it.
    if kind == "nf4":
        assert rewritten < 0.5 * subtracted and subtracted < 1.1 * of_base
    else:
        assert subtracted < (1.5 if trained else 0.8) * rewritten
    print(
        f"{kind}, factors changed by {trained:g}: error of the base {of_base:.2e}, subtracted {subtracted:.2e}, "
        f"residual base {rewritten:.2e}"
    )


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    made.weight.data.copy_(weight)
    return made.requires_grad_(False)


@pytest.mark.parametrize(
    ("method", "adapter", "reason"),
    [
        ({"name": "weightlora", "k": 2, "disconnect_at": 2}, {}, "scales its triples"),
        ({"name": "ard_lora", "t_i": 2, "interval": 2, "t_f": 2}, {}, "modules are attention heads"),
        (None, {"init_from": "somewhere"}, "initial triples of its own"),
    ],
)
def test_what_does_not_combine_is_refused_with_the_reason(
    method: dict[str, Any] | None, adapter: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RecipeError, match=f"adapter.init is pissa with .*{reason}"):
        recipe(Path("model"), method, **adapter)


def test_a_trainer_of_hugging_face_refuses_it(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"adapter.init pissa is not available in a Trainer: train with launcher"
    ):
        DynamicRankCallback(base(folder), {"name": "lora"}, {"init": "pissa"})
