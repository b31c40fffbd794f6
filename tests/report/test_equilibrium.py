"""Dynamic DoRA's figures: the penalty without its weight, and the variances of the rows that it acts on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dynrank_ds.report.equilibrium import equilibrium_plots, row_variances
from dynrank_ds.report.record import read_run

from .conftest import START, metric, write_lines, write_run


def dora_run(folder: Path, eta: float) -> Path:
    """30 steps, the penalty falls as 1 / step until the last mask after step 20."""
    run = write_run(folder, START, "dynamic_dora")
    recipe = {"method": {"name": "dynamic_dora", "variance": eta}, "adapter": {"init_from": None}}
    (run / "recipe.resolved.yaml").write_text(json.dumps(recipe))
    penalties = [eta / step if step <= 20 and eta else 0.0 if eta else None for step in range(1, 31)]
    write_lines(
        run / "metrics.jsonl",
        [metric(step, 1.0) | {"penalty": penalty} for step, penalty in enumerate(penalties, start=1)],
    )
    return run


def test_the_curve_is_the_penalty_without_its_weight_until_the_last_mask(tmp_path: Path) -> None:
    plots = {p.name: p for p in equilibrium_plots(read_run(dora_run(tmp_path / "run", 0.5)), [])}
    assert plots["equilibrium"].rows == [("run", step, pytest.approx(1 / step)) for step in range(1, 21)]


def test_the_effect_is_shown_by_the_rows_of_runs_with_and_without_it(tmp_path: Path) -> None:
    with_dem, without = dora_run(tmp_path / "with", 0.5), dora_run(tmp_path / "without", 0.0)
    tensors = load_file(with_dem / "checkpoints/step-30/state.safetensors")
    rows = np.concatenate([value for name, value in tensors.items() if name.endswith("lora_A")])
    found = row_variances(read_run(with_dem))
    assert sorted(found["A"]) == pytest.approx(sorted(rows.astype(float).var(axis=1, ddof=1)))
    assert len(found["A"]) == len(found["B"]) == sum(START.values())

    plots = {p.name: p for p in equilibrium_plots(read_run(with_dem), [read_run(without)])}
    assert {row[0] for row in plots["row_variance"].rows} == {"with", "without"}
    panels = plots["row_variance"].figure.axes
    # Begins at 2 / in and 2 / r: 8 inputs and 4 triples in every module.
    assert [panels[i].lines[0].get_xdata()[0] for i in (0, 1)] == pytest.approx(np.log10([2 / 8, 2 / 4]))
    assert "equilibrium" not in {p.name for p in equilibrium_plots(read_run(without), [])}


def test_other_methods_have_no_such_figures(tmp_path: Path, run: Path) -> None:
    assert equilibrium_plots(read_run(run), [read_run(dora_run(tmp_path / "other", 0.5))]) == []
