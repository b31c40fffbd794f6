"""Linears whose heads are modules, against dense matrices put together head by head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from dynrank_ds.adapters.heads import HeadedLinear, HeadSplit, head_splits
from dynrank_ds.adapters.initial import lora_factors, module_generator, svd_factors
from dynrank_ds.adapters.linear import AdaptedLinear, AdaptedModule, ModuleBackward, Part
from dynrank_ds.errors import ModelError, RecipeError
from tests.support.named import inject_named

SCALE, HEADS = 1.7, 3
SIDES = {"rows": (5, 12), "columns": (12, 5)}
RANKS = (2, 0, 3)


def headed(side: str, ranks: tuple[int, ...] = RANKS, gate: str = "none") -> HeadedLinear:
    torch.manual_seed(0)
    base = nn.Linear(*SIDES[side], dtype=torch.float64).requires_grad_(False)
    linear = HeadedLinear(base, HeadSplit(side, HEADS), SCALE, "layers.0.proj")  # type: ignore[arg-type]
    for module, rank in zip(modules_of(linear), ranks, strict=True):
        factors = {
            "lora_A": torch.randn(rank, module.in_features, dtype=torch.float64),
            "lora_B": torch.randn(rank, module.out_features, dtype=torch.float64),
        }
        if gate == "e":
            factors["lora_E"] = torch.randn(rank, dtype=torch.float64)
        module.set_factors(factors if rank else {})
        module.gate = {"soft": torch.rand(rank).double(), "weight": torch.rand(1).double()}.get(gate)
    return linear


def modules_of(linear: HeadedLinear) -> list[AdaptedModule]:
    return list(linear.adapted_modules("x").values())


def dense(linear: HeadedLinear, factors: list[dict[str, Tensor]], gates: list[Tensor | None]) -> Tensor:
    """W with s B^T diag(g) A added where each head stands."""
    weight = linear.base.weight
    for module, own, gate in zip(modules_of(linear), factors, gates, strict=True):
        if own:
            g = own.get("lora_E", gate)
            middle = torch.diag(torch.ones(len(own["lora_A"]), dtype=torch.float64) if g is None else g)
            delta = SCALE * own["lora_B"].T @ middle @ own["lora_A"]
            part = module.part
            before, after = part.start, part.of - part.stop
            pad = (0, 0, before, after) if part.side == "rows" else (before, after, 0, 0)
            weight = weight + nn.functional.pad(delta, pad)
    return weight


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("gate", ["none", "e", "soft", "weight"])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_output_and_gradients_are_those_of_the_dense_matrix(
    side: str, gate: str, shape: tuple[int, ...]
) -> None:
    linear = headed(side, gate=gate)
    seen: dict[int, ModuleBackward] = {}
    for i, module in enumerate(modules_of(linear)):
        module.on_backward = lambda backward, i=i: seen.setdefault(i, backward)  # type: ignore[misc]
    copies = [
        {name: f.detach().clone().requires_grad_() for name, f in module.factors().items()}
        for module in modules_of(linear)
    ]
    gates = [
        None if module.gate is None else module.gate.expand(rank).clone().requires_grad_()
        for module, rank in zip(modules_of(linear), RANKS, strict=True)
    ]
    x = torch.randn(*shape, SIDES[side][0], dtype=torch.float64, requires_grad=True)
    plain_x = x.detach().clone().requires_grad_()
    ours = linear(x)
    plain = plain_x @ dense(linear, copies, gates).T + linear.base.bias
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(ours)
    ours.backward(direction)
    plain.backward(direction)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-12, atol=1e-12)
    for i, (module, copy) in enumerate(zip(modules_of(linear), copies, strict=True)):
        assert module.factors().keys() == copy.keys()
        for name, factor in module.factors().items():
            torch.testing.assert_close(factor.grad, copy[name].grad, rtol=1e-12, atol=1e-12)
        if gates[i] is not None and RANKS[i]:
            torch.testing.assert_close(seen[i].grad_gate, gates[i].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("with_checkpointing", [False, True])
def test_the_hook_of_a_head_sees_what_its_module_alone_would_see(side: str, with_checkpointing: bool) -> None:
    linear, seen = headed(side, gate="soft"), {}
    for i, module in enumerate(modules_of(linear)):
        module.on_backward = lambda backward, i=i: seen.setdefault(i, []).append(backward)  # type: ignore[misc]
    x = torch.randn(2, 4, SIDES[side][0], dtype=torch.float64, requires_grad=True)
    y = checkpoint(linear, x, use_reentrant=False) if with_checkpointing else linear(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    assert sorted(seen) == [0, 2]
    for i, (backward,) in seen.items():
        module = modules_of(linear)[i]
        rows = slice(module.part.start, module.part.stop)
        own_x, own_y = (x[..., rows], direction) if side == "columns" else (x, direction[..., rows])
        alone = AdaptedModule(module.in_features, module.out_features, SCALE, torch.float64)
        alone.set_factors({name: f.detach().clone() for name, f in module.factors().items()})
        alone.gate, shown = module.gate, []
        alone.on_backward = shown.append
        alone.update(own_x.detach()).backward(own_y)
        for field in ("x", "grad_y", "lora_a", "lora_b", "gate", "grad_a", "grad_b", "grad_gate"):
            torch.testing.assert_close(getattr(backward, field), getattr(shown[0], field), msg=field)
        assert backward.scale == SCALE


def test_what_a_hook_adds_to_a_heads_gradients_reaches_its_factors() -> None:
    for side in SIDES:
        without, with_work = headed(side), headed(side)

        def work(backward: ModuleBackward) -> None:
            backward.grad_a += 0.5 * backward.lora_a
            backward.grad_b += 0.25 * backward.lora_b

        modules_of(with_work)[2].on_backward = work
        for linear in (without, with_work):
            torch.manual_seed(1)
            linear(torch.randn(4, SIDES[side][0], dtype=torch.float64)).square().sum().backward()
        for i, (a, b) in enumerate(zip(modules_of(without), modules_of(with_work), strict=True)):
            for name, share in (("lora_A", 0.5), ("lora_B", 0.25)):
                if RANKS[i]:
                    extra = share * b.factors()[name] if i == 2 else 0
                    torch.testing.assert_close(b.factors()[name].grad, a.factors()[name].grad + extra)


@pytest.mark.parametrize("side", SIDES)
def test_a_linear_whose_heads_have_no_triples_is_its_base(side: str) -> None:
    linear = headed(side, ranks=(0, 0, 0))
    x = torch.randn(4, SIDES[side][0], dtype=torch.float64)
    assert torch.equal(linear(x), linear.base(x))
    assert [name for name, _ in linear.named_parameters()] == ["base.weight", "base.bias"]


def test_slots_whose_gate_is_zero_change_nothing() -> None:
    linear = headed("rows", gate="soft")
    x = torch.randn(4, 5, dtype=torch.float64)
    module = modules_of(linear)[2]
    module.gate[2] = 0
    with_slot = linear(x)
    module.set_factors({name: f.detach()[:2] for name, f in module.factors().items()})
    module.gate = module.gate[:2]
    torch.testing.assert_close(linear(x), with_slot, rtol=1e-14, atol=1e-14)


def llama(**changes: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes | {"num_hidden_layers": 2, "vocab_size": 50} | changes))


def test_grouped_query_attention_has_fewer_key_and_value_heads() -> None:
    model = llama()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    modules = inject_named(model, targets, 2, 1.5, lora_factors, 0, head_splits(model.config))
    prefix = "model.layers.1.self_attn"
    names = [name for name in modules if name.startswith("model.layers.1.")]
    assert names == [
        *(f"{prefix}.q_proj.blocks.{h}" for h in range(4)),
        *(f"{prefix}.k_proj.blocks.{h}" for h in range(2)),
        *(f"{prefix}.v_proj.blocks.{h}" for h in range(2)),
        *(f"{prefix}.o_proj.blocks.{h}" for h in range(4)),
        "model.layers.1.mlp.up_proj",
    ]
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert modules[f"{prefix}.k_proj.blocks.1"].part == Part(f"{prefix}.k_proj", "rows", 8, 16, 16)
    assert modules[f"{prefix}.o_proj.blocks.3"].part == Part(f"{prefix}.o_proj", "columns", 24, 32, 32)
    assert isinstance(modules["model.layers.1.mlp.up_proj"], AdaptedLinear)
    for name, module in modules.items():
        assert module.initial_rank == 2 and module.scale == 1.5
        drawn = lora_factors(2, module.in_features, module.out_features, module_generator(0, name, 0))
        assert all(torch.equal(module.factors()[f], drawn[f]) for f in drawn)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{b}.{f}" for b in modules for f in ("lora_A", "lora_B")}


def test_a_head_of_its_own_size_is_cut_by_the_number_of_heads() -> None:
    model = llama(head_dim=6)
    modules = inject_named(model, ["q_proj", "o_proj"], 2, 1.0, svd_factors, 0, head_splits(model.config))
    assert modules["model.layers.0.self_attn.q_proj.blocks.3"].part.stop == 24
    assert modules["model.layers.0.self_attn.o_proj.blocks.0"].in_features == 6


def test_a_model_of_adapted_heads_with_zero_b_is_the_base_model() -> None:
    tokens = torch.randint(50, (2, 7))
    model = llama()
    before = model(tokens).logits
    inject_named(
        model, ["q_proj", "k_proj", "v_proj", "o_proj"], 2, 1.0, lora_factors, 0, head_splits(model.config)
    )
    assert torch.equal(model(tokens).logits, before)


def test_what_cannot_be_cut_into_heads_is_refused() -> None:
    with pytest.raises(ModelError, match=r"x has 12 rows, no multiple of its 5 heads"):
        HeadedLinear(nn.Linear(5, 12), HeadSplit("rows", 5), 1.0, "x")
    with pytest.raises(ModelError, match=r"no num_attention_heads"):
        head_splits(SimpleNamespace())  # type: ignore[arg-type]
    model = llama()
    with pytest.raises(RecipeError, match=r"adapter.rank is 9, but .*q_proj.blocks.0 is 8 x 32: at most 8"):
        inject_named(model, ["q_proj"], 9, 1.0, lora_factors, 0, head_splits(model.config))
