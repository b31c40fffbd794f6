"""Any recipe that the schema accepts trains, or is refused in one sentence before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.drawn import draw
from tests.support.launch import outcomes, run_worker
from tests.support.recipes import lines, write_recipe

KEEPING_THE_TOTAL = ("pe_dyra", "elalora")


@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [
        (1, range(0, 15)),
        (2, range(15, 30)),
        pytest.param(1, range(100, 235), marks=pytest.mark.slow),
        pytest.param(2, range(235, 370), marks=pytest.mark.slow),
    ],
)
def test_drawn_recipes_train_or_are_refused(world_size: int, seeds: range, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    for seed in seeds:
        (tmp_path / f"{seed}.yaml").write_text(yaml.safe_dump(draw(seed)))
    run_worker(world_size, "drawn", tmp_path, *map(str, seeds))
    trained = 0
    for seed in seeds:
        found = outcomes(tmp_path, f"outcome-{seed}", world_size)
        assert len(set(found)) == 1, (seed, found)
        run = tmp_path / f"run-{seed}"
        if found[0]:
            assert "\n" not in found[0] and not run.exists(), (seed, found[0])
            continue
        trained += 1
        check_run(run, draw(seed))
        check_peft_loads(run, tmp_path / "model")
    assert trained >= 0.4 * len(seeds), f"only {trained} of {len(seeds)} recipes were trained"


def check_run(run: Path, recipe: dict[str, Any]) -> None:
    """The log has every step once, and its ranks are those that the metrics count."""
    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, recipe["train"]["steps"] + 1))
    stored = {line["step"]: line["total_rank_stored"] for line in metrics}
    ranks = run / "ranks.jsonl"
    for line in lines(ranks) if ranks.is_file() else []:
        assert sum(line["after"].values()) == stored[line["step"]]
        pruned = sum(map(len, line["pruned"].values()))
        assert sum(line["before"].values()) - pruned + sum(line["added"].values()) == stored[line["step"]]
        if recipe["method"]["name"] in KEEPING_THE_TOTAL:
            assert sum(line["before"].values()) == sum(line["after"].values())


def check_peft_loads(run: Path, base: Path) -> None:
    """PEFT's model has the ranks of the last adjustment, and makes finite logits."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "adapter"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
    if not (run / "ranks.jsonl").is_file():
        return
    after = lines(run / "ranks.jsonl")[-1]["after"]
    if any(".blocks." in name for name in after):  # heads: PEFT has one adapter for all of them
        return
    loaded = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): parameter.shape[0]
        for name, parameter in model.named_parameters()
        if ".lora_A." in name
    }
    assert loaded == {name: rank for name, rank in after.items() if rank}
