"""PE-DyRA's scores against sections 3.2 and 3.3 of the paper, written out on whole tensors in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dynrank_ds.methods.pe_dyra import PEDyRA
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankState
from dynrank_ds.zero.shards import zero3_rules
from tests.methods.small import SIDES, Sides, pe_dyra, random_sides, step_view
from tests.ranking.thread_processes import ThreadProcess, run_in_threads, shard

FACTORS = ("lora_A", "lora_E", "lora_B")
RANKS = (3, 1, 4)
Whole = dict[str, list[Tensor]]
"""{factor: one (rank, row) tensor a module}"""


def random_whole(seed: int, scale: float = 1.0, sides: Sides = SIDES) -> Whole:
    generator = torch.Generator().manual_seed(seed)
    return {
        factor: [
            torch.randn(
                rank,
                {"lora_A": n_in, "lora_E": 1, "lora_B": n_out}[factor],
                generator=generator,
                dtype=torch.float64,
            )
            * scale
            for rank, (n_in, n_out) in zip(RANKS, sides.values(), strict=True)
        ]
        for factor in FACTORS
    }


def local(whole: Whole, process: ThreadProcess) -> Tensor:
    return shard([module for factor in FACTORS for module in whole[factor]], process.rank, process.size)


def formula(
    weights: Whole,
    gradients: Whole,
    smoothed: Whole,
    uncertainty: Whole,
    energy: Sequence[Tensor],
    mix: float = 0.5,
    normalise: str = "mean",
    combination: str = "gradient_aware",
    input_energy: str = "mean_square",
) -> list[Tensor]:
    by_gradient, by_input = [], []
    for b, rank in enumerate(RANKS):
        norms = {f: float(gradients[f][b].norm()) for f in FACTORS}
        if combination == "linear":
            norms = dict.fromkeys(FACTORS, 1.0)
        together = sum(norms.values())
        xe = energy[b].sqrt() if input_energy == "rms" else energy[b]
        for i in range(rank):
            score = 0.0
            for f in FACTORS:
                weight = norms[f] / together if together else 1 / 3
                score += weight * float((smoothed[f][b][i] * uncertainty[f][b][i]).mean())
            by_gradient.append(score)
            features = float((weights["lora_A"][b][i].abs() * xe).sum())
            by_input.append(
                float(weights["lora_E"][b][i].abs()) * features * float(weights["lora_B"][b][i].norm())
            )
    g, x = torch.tensor(by_gradient, dtype=torch.float64), torch.tensor(by_input, dtype=torch.float64)
    if normalise == "mean":
        g, x = (v / v.mean() if v.mean() > 0 else v for v in (g, x))
    return list((mix * g + (1 - mix) * x).split(RANKS))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"mix": 0.3},
        {"mix": 0.3, "normalise": "none"},
        {"mix": 1.0},
        {"combination": "linear"},
        {"input_energy": "rms"},
    ],
    ids=str,
)
def test_scores_from_shards_are_those_of_the_formula(size: int, options: Mapping[str, Any]) -> None:
    weights, gradients = random_whole(0), random_whole(1, scale=1e-2)
    smoothed = {f: [v.abs() for v in modules] for f, modules in random_whole(2).items()}
    uncertainty = {f: [v.abs() for v in modules] for f, modules in random_whole(3).items()}
    parts = [[torch.rand(n_in) for n_in, _ in SIDES.values()] for _ in range(size)]
    energy = [sum(part[b].double() for part in parts) for b in range(3)]

    def work(process: ThreadProcess) -> list[Tensor]:
        method = pe_dyra(dtype=torch.float64, **options)
        layout = ShardLayout(
            method.shapes, RANKS, FACTORS, zero3_rules((), (), (), process.size)[process.rank]
        )
        method.start(layout)
        method.row_statistics["sensitivity"] = local(smoothed, process)
        method.row_statistics["uncertainty"] = local(uncertainty, process)
        method.partial_statistics["input_energy"].copy_(torch.cat(parts[process.rank]))
        view = step_view(local(weights, process), local(gradients, process), layout, process.all_reduce_sum)
        scores = method.scores(view)
        assert process.sums <= 2
        return list(scores)

    expected = formula(weights, gradients, smoothed, uncertainty, energy, **options)
    for scores in run_in_threads(size, work):
        for ours, theirs in zip(scores, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_scores_after_steps_on_three_processes_follow_the_recursions(
    dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    """From the weights, gradients and inputs of 14 steps on."""
    sides = random_sides(seed)
    print(f"seed {seed}: sides {sides}")
    torch.manual_seed(seed)
    steps = [(random_whole(10 + t, sides=sides), random_whole(30 + t, 1e-2, sides)) for t in range(14)]
    inputs = [
        [[torch.randn(4, n_in, dtype=dtype) for n_in, _ in sides.values()] for _ in range(3)] for _ in steps
    ]

    def work(process: ThreadProcess) -> list[Tensor]:
        method = pe_dyra(sides, dtype=dtype)
        layout = ShardLayout(method.shapes, RANKS, FACTORS, zero3_rules((), (), (), 3)[process.rank])
        method.start(layout)
        for number, (w, g) in enumerate(steps, start=1):
            for module, x in enumerate(inputs[number - 1][process.rank]):
                method.energy.add(module, x, torch.ones(1, 4))
            w_here, g_here = local(w, process).to(dtype), local(g, process).to(dtype)
            view = step_view(w_here, g_here, layout, process.all_reduce_sum, step=number, tokens=12)
            method.observe(view)
        return list(method.scores(view))

    zero = {f: [torch.zeros_like(v) for v in modules] for f, modules in steps[0][0].items()}
    smoothed, uncertainty = zero, zero
    energy = [torch.zeros(n_in, dtype=torch.float64) for n_in, _ in sides.values()]
    for (w, g), seen in zip(steps, inputs, strict=True):
        now = {f: [(a * b).abs() for a, b in zip(w[f], g[f], strict=True)] for f in FACTORS}
        smoothed = _ema(smoothed, now)
        away = {f: [(a - b).abs() for a, b in zip(now[f], smoothed[f], strict=True)] for f in FACTORS}
        uncertainty = _ema(uncertainty, away)
        for b in range(3):
            tokens = torch.cat([seen[p][b] for p in range(3)]).double()
            energy[b] = 0.85 * energy[b] + 0.15 * tokens.square().mean(0)
    expected = formula(*steps[-1], smoothed, uncertainty, energy)
    for scores in run_in_threads(3, work):
        for ours, theirs in zip(scores, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


def _ema(old: Whole, now: Whole) -> Whole:
    return {f: [0.85 * a + 0.15 * b for a, b in zip(old[f], now[f], strict=True)] for f in FACTORS}


def test_random_importance_depends_on_neither_weights_nor_processes_and_is_drawn_each_time() -> None:
    def drawn(step: int, seed: int, size: int = 1) -> Tensor:
        def work(process: ThreadProcess) -> list[Tensor]:
            method = pe_dyra(importance="random")
            rules = zero3_rules((), (), (), size)
            layout = ShardLayout(method.shapes, RANKS, FACTORS, rules[process.rank])
            method.start(layout)
            here = local(random_whole(seed), process)
            return list(method.scores(step_view(here, here, layout, process.all_reduce_sum, step=step)))

        several = [torch.cat(scores) for scores in run_in_threads(size, work)]
        assert all(torch.equal(other, several[0]) for other in several)
        return several[0]

    first = drawn(step=7, seed=0)
    assert len(first.unique()) == sum(RANKS)
    assert torch.equal(drawn(step=7, seed=1, size=3), first)
    assert not torch.isin(drawn(step=10, seed=0), first).any()


@pytest.mark.parametrize("normalise", ["mean", "none"])
def test_scores_of_nothing_but_zeros_are_zero_and_can_be_planned(normalise: str) -> None:
    method = pe_dyra(k=3, normalise=normalise)
    layout = ShardLayout(method.shapes, RANKS, FACTORS, zero3_rules((), (), (), 1)[0])
    method.start(layout)
    nothing = torch.zeros(layout.numel)
    scores = method.scores(step_view(nothing, nothing, layout))
    assert [s.tolist() for s in scores] == [[0.0] * rank for rank in RANKS]
    plan = method.plan(scores, RankState(RANKS, (9, 9, 9), 4, 7, 20))
    assert plan.pruned(RANKS) == [[0, 1], [], [0]]
    assert plan.new == (1, 1, 1)


def test_without_any_gradient_the_three_factors_weigh_alike() -> None:
    method: PEDyRA = pe_dyra(mix=1.0, normalise="none")
    layout = ShardLayout(method.shapes, RANKS, FACTORS, zero3_rules((), (), (), 1)[0])
    method.start(layout)
    ones = torch.ones(layout.numel)
    method.row_statistics |= {"sensitivity": ones, "uncertainty": 6 * ones}
    scores = method.scores(step_view(ones, 0 * ones, layout))
    torch.testing.assert_close(torch.cat(list(scores)), torch.full((8,), 6.0, dtype=torch.float64))
