"""What AdaLoRA and ElaLoRA share, against AdaLoRA's formulas written out triple by triple in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynrank_ds.adapters.initial import module_generator, svd_factors
from dynrank_ds.methods.base import MicroBatch
from dynrank_ds.methods.elalora import ElaLoRA, ElaLoRAConfig
from dynrank_ds.ranking.layout import ShardLayout
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.zero.migrate import migrate
from dynrank_ds.zero.shards import zero3_rules
from tests.methods.small import CPU, SIDES, Sides, make_modules, random_sides, step_view
from tests.ranking.thread_processes import ThreadProcess, run_in_threads, shard

FACTORS = ("lora_A", "lora_E", "lora_B")
STEPS, CHANGE, RANK = 25, 12, 4
Whole = dict[tuple[str, int], Tensor]
"""{(factor, module): (rank, row) fp64}"""


def random_whole(ranks: tuple[int, ...], seed: int, sides: Sides) -> Whole:
    generator = torch.Generator().manual_seed(seed)
    return {
        (factor, b): torch.randn(rank, length, generator=generator, dtype=torch.float64)
        for factor in FACTORS
        for b, (rank, (n_in, n_out)) in enumerate(zip(ranks, sides.values(), strict=True))
        for length in [{"lora_A": n_in, "lora_E": 1, "lora_B": n_out}[factor]]
    }


def elalora(sides: Sides = SIDES, **config: object) -> ElaLoRA:
    times = {"t_i": 2, "interval": 10, "t_f": 0, "b": 3, "k": 2, **config}
    made = make_modules(sides, rank=RANK, dtype=torch.float64)
    return ElaLoRA(ElaLoRAConfig(**times), made, STEPS, CPU)  # type: ignore[arg-type]


class Formula:
    """AdaLoRA, eq. 8 to 11, on whole tensors."""

    def __init__(self, sides: Sides) -> None:
        self.smoothed = {key: 0 * w for key, w in random_whole((RANK,) * 3, 0, sides).items()}
        self.uncertainty = dict(self.smoothed)

    def step(self, weights: Whole, gradients: Whole) -> None:
        for key, w in weights.items():
            now = (w * gradients[key]).abs()
            self.smoothed[key] = 0.85 * self.smoothed[key] + 0.15 * now
            self.uncertainty[key] = 0.85 * self.uncertainty[key] + 0.15 * (now - self.smoothed[key]).abs()

    def scores(self, module: int) -> list[float]:
        s = {f: self.smoothed[f, module] * self.uncertainty[f, module] for f in FACTORS}
        return [
            float(s["lora_E"][i, 0] + s["lora_A"][i].mean() + s["lora_B"][i].mean())
            for i in range(s["lora_E"].shape[0])
        ]

    def change(self, plan: RankPlan) -> None:
        for values in (self.smoothed, self.uncertainty):
            for factor, b in values:
                old = values[factor, b]
                values[factor, b] = torch.cat(
                    [old[list(plan.keep[b])], old.new_zeros(plan.new[b], old.shape[1])]
                )


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (3, 0), (3, 1), (2, 2)])
def test_scores_follow_the_formulas_over_many_steps_and_a_rank_change(size: int, seed: int) -> None:
    sides = random_sides(seed)
    print(f"seed {seed}: sides {sides}; weights and gradients from seeds 100 to 101 + 2 * steps")

    def pair(step: int, ranks: tuple[int, ...]) -> tuple[Whole, Whole]:
        return random_whole(ranks, 100 + 2 * step, sides), random_whole(ranks, 101 + 2 * step, sides)

    def work(process: ThreadProcess) -> tuple[RankPlan, list[Tensor], list[Tensor]]:
        method = elalora(sides)
        ranks: tuple[int, ...] = (RANK,) * 3
        rules = zero3_rules((), (), (), size)
        layout = ShardLayout(method.shapes, ranks, FACTORS, rules[process.rank])
        method.start(layout)
        for step in range(1, STEPS + 1):
            weights, gradients = (shard(list(w.values()), process.rank, size) for w in pair(step, ranks))
            view = step_view(weights, gradients, layout, process.all_reduce_sum, step=step)
            method.observe(view)
            assert process.sums == 2 * (step > CHANGE)  # for scores, and to gather the modules that changed
            if step == CHANGE:
                before = list(method.scores(view))
                plan = method.plan(before, RankState(ranks, (9,) * 3, RANK, step, STEPS))
                new = ShardLayout(method.shapes, plan.ranks, FACTORS, rules[process.rank])
                states = torch.stack([weights, *method.row_statistics.values()])
                moved = migrate(
                    states,
                    layout,
                    new,
                    plan,
                    method_rows(method, plan),
                    (rules, rules),
                    process.all_reduce_sum,
                )[0]
                method.row_statistics.update(zip(list(method.row_statistics), moved[1:], strict=True))
                layout, ranks = new, plan.ranks
        return plan, before, list(method.scores(view))

    for plan, before, after in run_in_threads(size, work):
        assert sum(plan.new) == 3
        formula = Formula(sides)
        for step in range(1, STEPS + 1):
            if step < STEPS:  # the last step is within t_f = 0 of the end: not observed
                formula.step(*pair(step, (RANK,) * 3 if step <= CHANGE else plan.ranks))
            if step == CHANGE:
                for b, scores in enumerate(before):
                    torch.testing.assert_close(scores.tolist(), formula.scores(b), rtol=1e-10, atol=0)
                formula.change(plan)
        for b, scores in enumerate(after):
            assert scores.dtype == torch.float64
            torch.testing.assert_close(scores.tolist(), formula.scores(b), rtol=1e-10, atol=0)


def method_rows(method: ElaLoRA, plan: RankPlan):  # type: ignore[no-untyped-def]
    return lambda module, old: method.new_rows(module, old, plan, module_generator(0, str(module), CHANGE))


def test_the_penalty_is_the_mean_norm_over_all_factor_matrices() -> None:
    modules = make_modules(rank=3)
    method = ElaLoRA(ElaLoRAConfig(t_i=2, interval=5, t_f=3, orthogonality=0.3), modules, 20, CPU)
    for name, module in modules.items():
        module.set_factors(svd_factors(3, *SIDES[name], module_generator(0, name, 0)))
    for last in (True, False):
        method.begin_micro_batch(MicroBatch(last=last))
        for name, module in modules.items():
            (0 * module(torch.randn(1, 2, SIDES[name][0]))).sum().backward()  # a task without gradient
    ours = [f for b in modules.values() for f in (b.lora_A, b.lora_B)]
    copies = [f.detach().double().requires_grad_() for f in ours]
    norms = [torch.linalg.matrix_norm(f @ f.T - torch.eye(3, dtype=torch.float64)) for f in copies]
    (0.3 * torch.stack(norms).mean()).backward()
    for factor, copy in zip(ours, copies, strict=True):
        torch.testing.assert_close(factor.grad.double(), copy.grad, rtol=1e-5, atol=1e-7)


def test_observing_after_the_step_is_an_option_of_the_instance() -> None:
    assert not elalora().observes_after_step
    assert elalora(observe="after_step").observes_after_step
