"""AdaLoRA against PEFT's allocator, an independent transcription of the authors' code."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.methods.adalora import AdaLoRA, AdaLoRAConfig
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankState
from dynrank_ds.zero.shards import zero3_rules
from tests.methods.small import CPU, SIDES, make_modules, step_view
from tests.ranking.thread_processes import ThreadProcess, run_in_threads, shard

FACTORS = ("lora_A", "lora_E", "lora_B")
STEPS, RANK, TARGET = 40, 6, 3
TIMES: dict[str, Any] = {"t_i": 5, "interval": 4, "t_f": 10}
ALPHA, PENALTY = 8, 0.1


class Linears(nn.Module):
    """a, b and c beside one another, and a loss that pulls them apart."""

    def __init__(self) -> None:
        super().__init__()
        for name, sides in SIDES.items():
            self.add_module(name, nn.Linear(*sides))

    def forward(self, inputs: list[Tensor], targets: list[Tensor]) -> SimpleNamespace:
        pairs = zip(SIDES, inputs, targets, strict=True)
        return SimpleNamespace(loss=sum((getattr(self, n)(x) - y).square().mean() for n, x, y in pairs))


def peft_model(base: nn.Module) -> Any:
    config = AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        tinit=TIMES["t_i"],
        tfinal=TIMES["t_f"],
        deltaT=TIMES["interval"],
        total_step=STEPS,
        lora_alpha=ALPHA,
        orth_reg_weight=PENALTY,
        target_modules=list(SIDES),
    )
    return get_peft_model(base, config)


def peft_factors(model: Any) -> dict[str, list[nn.Parameter]]:
    layers = [getattr(model.base_model.model, name) for name in SIDES]
    return {f: [getattr(layer, f)["default"] for layer in layers] for f in FACTORS}


def by_rows(factors: dict[str, list[Tensor]]) -> list[Tensor]:
    """PEFT's tensors as ours: one row a triple, all A, all E, all B."""
    return [t.T if f == "lora_B" else t for f in FACTORS for t in factors[f]]


@dataclass
class Allocation:
    """What PEFT's allocator did at one step."""

    scores: Tensor
    """Of all triples."""
    masked: list[list[int]]


class Allocator:
    """PEFT's, with its scores noted."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.noted: list[Tensor] = []
        allocator = model.base_model.rankallocator
        combine = allocator._combine_ipt

        def note(e: Tensor, ab: Tensor) -> Tensor:
            self.noted.append(combine(e, ab))
            return self.noted[-1]

        allocator._combine_ipt = note

    def step(self, global_step: int) -> Allocation | None:
        self.noted.clear()
        self.model.base_model.update_and_allocate(global_step)
        if not self.noted:
            return None
        pattern = self.model.peft_config["default"].rank_pattern
        kept = [next(v for k, v in pattern.items() if k.startswith(f"{name}.")) for name in SIDES]
        return Allocation(torch.cat(self.noted), [[i for i, k in enumerate(row) if not k] for row in kept])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_weights_and_gradients_give_its_scores_and_masks(size: int, dtype: torch.dtype) -> None:
    print("seed 0")
    torch.manual_seed(0)
    model = peft_model(Linears()).to(dtype)
    allocator, factors = Allocator(model), peft_factors(model)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    theirs: list[Allocation | None] = []
    for global_step in range(STEPS):
        for p in (p for f in FACTORS for p in factors[f]):
            p.data.normal_()
            p.grad = torch.randn_like(p)
        grads = {f: [p.grad.clone() for p in ps] for f, ps in factors.items()}
        seen.append(
            (by_rows({f: [p.detach().clone() for p in ps] for f, ps in factors.items()}), by_rows(grads))
        )
        theirs.append(allocator.step(global_step))

    def work(process: ThreadProcess) -> list[Allocation | None]:
        method = AdaLoRA(
            AdaLoRAConfig(target_rank=TARGET, **TIMES), make_modules(rank=RANK, dtype=dtype), STEPS, CPU
        )
        ranks = (RANK,) * 3
        layout = ShardLayout(method.shapes, ranks, FACTORS, zero3_rules((), (), (), size)[process.rank])
        method.start(layout)
        ours: list[Allocation | None] = []
        for step, pair in enumerate(seen, start=1):
            weights, gradients = (shard(tensors, process.rank, size) for tensors in pair)
            view = step_view(weights, gradients, layout, process.all_reduce_sum, step=step)
            method.observe(view)
            assert process.sums == 0
            if not method.adjusts_at(step):
                ours.append(None)
                continue
            scores = method.scores(view)
            assert process.sums == 1
            process.sums = 0
            plan = method.plan(scores, RankState(ranks, ranks, RANK, step, STEPS))
            gone = [list(b) for b in plan.masked] or plan.pruned(ranks)
            ours.append(Allocation(torch.cat(list(scores)), gone))
        return ours

    for ours in run_in_threads(size, work):
        assert [a is None for a in ours] == [a is None for a in theirs]
        compared = 0
        for mine, other in zip(ours, theirs, strict=True):
            if mine and other:
                limit = 1e-6 if dtype == torch.float32 else 1e-12
                torch.testing.assert_close(mine.scores, other.scores.double(), rtol=limit, atol=0)
                assert mine.masked == other.masked
                compared += 1
        assert compared == 7


def test_observed_after_the_step_training_is_pefts() -> None:
    """Losses, scores and masks of a whole training up to the final mask, with clipping and the penalty."""
    print("seed 1")
    torch.manual_seed(1)
    base = Linears()
    ours = Linears()
    ours.load_state_dict(base.state_dict())
    model = peft_model(base)
    allocator, factors = Allocator(model), peft_factors(model)
    config = AdaLoRAConfig(target_rank=TARGET, orthogonality=PENALTY, observe="after_step", **TIMES)
    own: dict[str, AdaptedLinear] = {}
    for number, name in enumerate(SIDES):
        module = own[name] = AdaptedLinear(getattr(ours, name), ALPHA / (RANK + 1e-5))
        module.initial_rank = RANK
        copied = {f: factors[f][number].detach().clone() for f in FACTORS}
        module.set_factors(
            {"lora_A": copied["lora_A"], "lora_E": copied["lora_E"][:, 0], "lora_B": copied["lora_B"].T}
        )
        setattr(ours, name, module)
    method = AdaLoRA(config, own, STEPS, CPU)
    assert method.observes_after_step
    layout = ShardLayout(method.shapes, (RANK,) * 3, FACTORS, whole)
    method.start(layout)
    params = [own[name].factors()[f] for f in FACTORS for name in SIDES]
    their_params = [p for ps in factors.values() for p in ps]
    optimizers = [torch.optim.AdamW(p, lr=0.02, weight_decay=0.01) for p in (params, their_params)]

    masks = 0
    goal = [nn.Linear(*sides) for sides in SIDES.values()]
    for step in range(1, STEPS - TIMES["t_f"] + 2):
        inputs = [torch.randn(9, sides[0]) for sides in SIDES.values()]
        targets = [linear(x).detach() for linear, x in zip(goal, inputs, strict=True)]
        losses = [ours(inputs, targets).loss, model.base_model(inputs, targets).loss]
        penalty = torch.stack(
            [torch.linalg.matrix_norm(p @ p.T - torch.eye(RANK)) for p in params if p.dim() == 2]
        ).mean()
        assert losses[0].item() + PENALTY * penalty.item() == pytest.approx(losses[1].item(), abs=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
        other = allocator.step(step - 1)

        flat = torch.cat([p.detach().flatten() for p in params])
        view = step_view(flat, torch.cat([p.grad.flatten() for p in params]), layout, step=step)
        method.observe(view)
        assert method.adjusts_at(step) == (other is not None)
        if other is not None:
            scores = method.scores(view)
            torch.testing.assert_close(torch.cat(list(scores)), other.scores.double(), rtol=1e-5, atol=1e-15)
            plan = method.plan(scores, RankState(layout.ranks, layout.ranks, RANK, step, STEPS))
            gone = [list(b) for b in plan.masked] or plan.pruned(layout.ranks)
            assert gone == other.masked
            masks += 1
            for module, triples in zip(own.values(), gone, strict=True):
                module.lora_E.data[triples] = 0
    assert masks == 7
