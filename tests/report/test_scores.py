"""What the figures of scores and adapters compute, against scipy-free definitions and known cases."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dynrank_ds.report.adapters import effective_rank
from dynrank_ds.report.record import read_run
from dynrank_ds.report.scores import (
    log_ratio_variance,
    module_importances,
    ratio_log_variance,
    score_plots,
    spearman,
)


def test_spearman_is_one_for_any_rising_relation_and_counts_ties_by_their_mean() -> None:
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4, so rho = cov / (s_x s_y) = 4.5 / sqrt(4.5 * 5).
    assert spearman([10, 20, 20, 40], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_variance_is_zero_where_ranks_follow_the_theorem() -> None:
    importance = np.array([1.0, 8.0, 27.0])
    assert log_ratio_variance(importance, np.array([1.0, 4.0, 9.0])) == pytest.approx(0)
    # log(G^(2/3)) is 0, 2 log 2, 2 log 3 for equal ranks.
    values = [0, 2 * math.log(2), 2 * math.log(3)]
    assert log_ratio_variance(importance, np.ones(3)) == pytest.approx(np.var(values))
    # The other reading of the paper's wording: G^(2/3) is 1, 4, 9, whose variance is 98 / 9.
    assert ratio_log_variance(importance, np.ones(3)) == pytest.approx(math.log(98 / 9))


def test_effective_rank_is_the_number_of_equal_directions() -> None:
    eye = torch.eye(6)[:3]
    assert effective_rank(eye, eye) == pytest.approx(3)
    assert effective_rank(eye, eye * torch.tensor([[1.0], [0.0], [0.0]])) == pytest.approx(1)
    assert effective_rank(eye, torch.zeros(3, 6)) == 0
    a, b = (
        torch.randn(3, 5, generator=torch.manual_seed(0)),
        torch.randn(3, 7, generator=torch.manual_seed(1)),
    )
    shares = torch.linalg.svdvals((b.T @ a).double())[:3]
    shares = shares / shares.sum()
    assert effective_rank(a, b) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5)


def test_importance_is_the_mean_score_of_a_modules_triples(run: Path) -> None:
    modules, means = module_importances(read_run(run))
    assert means.shape == (2, 36)
    assert modules[0] == "model.layers.0.self_attn.q_proj" and means[0, 0] == 1
    assert modules[-1] == "model.layers.11.mlp.down_proj" and means[0, -1] == 36


def test_figures_hold_every_module_and_adjustment(run: Path) -> None:
    plots = {plot.name: plot for plot in score_plots(read_run(run))}
    assert set(plots) == {"importance", "scores", "correlation", "variance"}
    first = [row for row in plots["importance"].rows if row[0] == 10]
    assert sorted(place for *_, place in first) == list(range(1, 37))
    assert dict((m, p) for _, m, _, p in first)["model.layers.11.mlp.down_proj"] == 1
    assert [step for step, *_ in plots["variance"].rows] == [10, 20]
    # rank of layer 11's down_proj, the most important, grows: nearer to the theorem than the initial ranks.
    assert all(after < fixed for _, after, fixed, *_ in plots["variance"].rows)
