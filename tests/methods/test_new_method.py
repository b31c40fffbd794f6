"""A new method is one file, as here, and one line in dynrank_ds/methods/__init__.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from dynrank_ds.adapters.initial import lora_factors
from dynrank_ds.adapters.linear import AdaptedModule, ModuleBackward
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import METHODS
from dynrank_ds.methods.base import Method, MethodConfig, MicroBatch, StepView
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.ranking.schedule import Schedule
from dynrank_ds.recipe import load_recipe
from tests.support.launch import run_worker
from tests.support.recipes import lines, write_recipe


class GreedyConfig(MethodConfig):
    name: Literal["greedy"] = "greedy"
    interval: int = 4

    def adjustments(self, total_steps: int) -> Schedule:
        phase = Schedule.resolve(total_steps, 0, self.interval)
        return phase.adjusting(range(phase.interval, phase.end, phase.interval))


class Greedy(Method):
    """Moves a triple from the module with the smallest mean |grad_y| of this process to the one with the largest."""

    config_class = GreedyConfig
    init = staticmethod(lora_factors)
    factors = ("lora_A", "lora_B")

    def __init__(
        self,
        config: GreedyConfig,
        modules: Mapping[str, AdaptedModule],
        total_steps: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, modules, total_steps, device)
        self.sums = torch.zeros(len(modules), dtype=torch.float64, device=device)
        self.partial_statistics["sums"] = self.sums

    def on_backward(self, module: int, backward: ModuleBackward, micro_batch: MicroBatch) -> None:
        assert micro_batch.step >= 1 and backward.x.shape[0] == sum(micro_batch.sample_sizes)
        self.sums[module] += backward.grad_y.double().abs().mean()

    def scores(self, view: StepView) -> Sequence[Tensor]:
        sums = view.all_reduce_sum(self.sums.clone())
        return view.layout.by_module(sums[view.layout.module_of_triple])

    def plan(self, scores: Sequence[Tensor], state: RankState) -> RankPlan:
        order = sorted(range(len(scores)), key=lambda b: (float(scores[b][0]), b))
        giver, taker = next(b for b in order if state.ranks[b] > 1), order[-1]
        keep = [tuple(range(rank - (b == giver))) for b, rank in enumerate(state.ranks)]
        return RankPlan(tuple(keep), tuple(int(b == taker) for b in range(len(keep))))


GREEDY = {"name": "greedy", "interval": 4}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "greedy", Greedy)  # the one line


def test_a_method_of_one_file_and_one_line_is_a_recipe_section(registered: None, tmp_path: Path) -> None:
    path = str(write_recipe(tmp_path))
    recipe = load_recipe(path, [f"method.{key}={value}" for key, value in GREEDY.items()])
    assert recipe.method == GreedyConfig(interval=4)
    assert "name: greedy\n  interval: 4\n" in recipe.dump()
    with pytest.raises(RecipeError, match=r"unknown key 'method.intervall': did you mean 'interval'?"):
        load_recipe(path, ["method.name=greedy", "method.intervall=2"])


def test_a_method_that_is_not_registered_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method.name is 'greedy': known are lora, pe_dyra, "):
        load_recipe(str(write_recipe(tmp_path)), ["method.name=greedy"])


def test_a_method_of_one_file_and_one_line_trains_and_resumes(tmp_path: Path) -> None:
    """In two processes: stopped after step 10 and resumed, it makes the plans of the run that was not stopped."""
    write_recipe(tmp_path)
    run_worker(2, "new_method", tmp_path)
    whole, resumed = (lines(tmp_path / name / "ranks.jsonl") for name in ("whole", "resumed"))
    assert [line["step"] for line in whole] == [4, 8, 12, 16]
    assert [line["plan_sha256"] for line in resumed] == [line["plan_sha256"] for line in whole]
    assert all(sum(line["after"].values()) == sum(line["before"].values()) for line in whole)
    assert all(score[0] > 0 for line in whole for score in line["scores"].values())
    assert whole[0]["scores"] != whole[1]["scores"]
