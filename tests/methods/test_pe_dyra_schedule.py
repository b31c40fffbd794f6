from __future__ import annotations

from typing import Any

import pytest
import torch

from dynrank_ds.errors import RecipeError
from dynrank_ds.methods.lora import LoRA, LoRAConfig
from dynrank_ds.ranking.layout import ModuleShape, ShardLayout, whole
from tests.methods.small import CPU, SIDES, make_modules, pe_dyra, step_view


def adjustments(total_steps: int = 20, **config: Any) -> list[int]:
    method = pe_dyra(total_steps=total_steps, **config)
    steps = [step for step in range(1, total_steps + 1) if method.adjusts_at(step)]
    assert method.planned_adjustments() == len(steps)
    return steps


def test_adjustments_start_one_interval_after_t_i_and_stop_before_the_last_t_f_steps() -> None:
    assert adjustments(t_i=4, interval=3, t_f=5) == [7, 10, 13]
    assert adjustments(t_i=4, interval=3, t_f=6) == [7, 10, 13]
    assert adjustments(t_i=4, interval=3, t_f=7) == [7, 10]  # step 13 is the first of the last 7
    assert adjustments(t_i=0, interval=1, t_f=16) == [1, 2, 3]
    assert adjustments(t_i=0, interval=19, t_f=0) == [19]


def test_times_may_be_fractions_of_training() -> None:
    assert adjustments(t_i=0.2, interval=0.15, t_f=0.25) == [7, 10, 13]
    assert adjustments(total_steps=130, t_i=0.2, interval=0.08, t_f=0.3) == [36, 46, 56, 66, 76, 86]


def test_the_papers_llama_run_adjusts_up_to_step_20000() -> None:
    # LLaMA2 on MetaMathQA: 31250 steps, t_i 2000, interval 1000, t_f 11250.
    assert adjustments(31250, t_i=2000, interval=1000, t_f=11250) == list(range(3000, 20000, 1000))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"interval": 0}, r"method.interval is 0, 0 of the 20 steps: give at least 1"),
        ({"interval": 0.01}, r"method.interval is 0.01, 0 of the 20 steps"),
        ({"interval": 40}, r"method.t_i 4 \+ method.interval 40 leaves no adjustment before step 15"),
        ({"t_i": 12, "t_f": 8}, r"leaves no adjustment before step 12 \(train steps 20 less method.t_f 8\)"),
        ({"t_i": 15, "t_f": 15}, r"leaves no adjustment before step 5"),
        ({"t_i": 1.5}, r"method.t_i is 1.5: give whole steps, or a fraction of training below 1"),
    ],
)
def test_times_that_leave_nothing_to_do_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        pe_dyra(**config)


def test_statistics_stand_still_in_the_last_t_f_steps() -> None:
    method = pe_dyra(total_steps=20, t_f=5)
    layout = ShardLayout(method.shapes, (2, 2, 2), method.factors, whole)
    method.start(layout)
    for step in range(1, 21):
        before = {**method.row_statistics, **method.partial_statistics}
        before = {name: value.clone() for name, value in before.items()}
        for module, (n_in, _) in enumerate(SIDES.values()):
            method.energy.add(module, torch.randn(3, n_in), torch.ones(1, 3))
        method.observe(
            step_view(torch.randn(layout.numel), torch.randn(layout.numel), layout, step=step, tokens=3)
        )
        after = {**method.row_statistics, **method.partial_statistics}
        assert all(torch.equal(before[n], after[n]) == (step >= 15) for n in before), step


def test_a_discarded_step_leaves_no_trace() -> None:
    twice, once = pe_dyra(), pe_dyra()
    layout = ShardLayout(once.shapes, (2, 2, 2), once.factors, whole)
    for method in (twice, once):
        method.start(layout)
    twice.energy.add(0, torch.full((3, 7), 9.0), torch.ones(1, 3))
    twice.discard_step()
    for method in (twice, once):
        method.energy.add(0, torch.ones(3, 7), torch.ones(1, 3))
        method.observe(step_view(torch.ones(layout.numel), torch.ones(layout.numel), layout, tokens=3))
    assert torch.equal(twice.energy.smoothed, once.energy.smoothed)


def test_lora_never_adjusts() -> None:
    method = LoRA(LoRAConfig(), make_modules(), 20, CPU)
    assert not any(method.adjusts_at(step) for step in range(1, 100))
    assert method.planned_adjustments() == 0
    assert method.factors == ("lora_A", "lora_B")
    assert method.shapes[0] == ModuleShape("a", 7, 5)
