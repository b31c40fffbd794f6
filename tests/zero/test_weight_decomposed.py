"""Weight-decomposed adapters under ZeRO: PEFT's DoRA at a fixed rank, and one run whatever the processes and stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dynrank_ds.export import merge_adapter
from dynrank_ds.recipe import load_recipe
from tests.support.decomposed import peft_losses, trained_model
from tests.support.launch import run_worker
from tests.support.methods import METHODS
from tests.support.recipes import STEPS, copy_stopped, lines, write_recipe
from tests.support.tiny import write_model

NAMES = ("lora", "adalora", "elalora", "pe_dyra")
EVERY_EIGHT = "train.checkpoint_interval=8,train.checkpoints_kept=9"
# A step after which ranks still change.
POINT = 8
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method's run in one process under ZeRO-3."""
    folder = tmp_path_factory.mktemp("decomposed")
    write_recipe(folder, micro_batch_size=3)
    for name in NAMES:
        values = {
            "base": "recipe.yaml",
            "method": METHODS.get(name, {"name": name}),
            "adapter": {"weight_decomposed": True},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    run_worker(1, "resuming", folder, *NAMES, EVERY_EIGHT)
    return folder


@pytest.fixture(scope="module")
def everywhere(folder: Path) -> Path:
    """Under ZeRO-2 in two processes, and resumed from one process's checkpoint in three under ZeRO-3."""
    run_worker(2, "resuming", folder, *(f"{name}-zero2" for name in NAMES), "deepspeed.config=zero2")
    stopped = [stopped_run(folder, name, "moved") for name in NAMES]
    run_worker(3, "resuming", folder, *stopped, "train.micro_batch_size=2")
    return folder


def stopped_run(folder: Path, name: str, what: str) -> str:
    """A copy of a whole run as if it had stopped at POINT."""
    return copy_stopped(folder / name, folder / f"{name}-{what}", POINT).name


def history(run: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Losses, and what every adjustment did; LoRA has none."""
    plans = lines(run / "ranks.jsonl") if (run / "ranks.jsonl").is_file() else []
    kept = [{k: line[k] for k in ("step", "after", "pruned", "added", "masked")} for line in plans]
    return [line["loss"] for line in lines(run / "metrics.jsonl")], kept


def test_at_a_fixed_rank_losses_are_those_of_pefts_dora_under_torchs_adamw(folder: Path) -> None:
    recipe = load_recipe(str(folder / "lora.yaml"))
    logged = lines(folder / "lora/metrics.jsonl")
    losses = peft_losses(recipe, [line["learning_rate"] for line in logged])
    difference = max(abs(line["loss"] - loss) for line, loss in zip(logged, losses, strict=True))
    print(f"largest difference of losses {difference:.2e}")
    assert difference <= 2e-6
    # Magnitudes take part in the norm that gradients are clipped by.
    assert all(line["grad_norms"]["magnitude_offset"] > 0 for line in logged[1:])
    for line in logged:
        parts = sum(norm**2 for norm in line["grad_norms"].values()) ** 0.5
        assert line["grad_norm"] == pytest.approx(parts)


@pytest.mark.parametrize("setup", ["zero2", "moved"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_plans_do_not_depend_on_processes_stage_and_resuming(
    everywhere: Path, name: str, setup: str
) -> None:
    losses, plans = history(everywhere / name)
    others, other_plans = history(everywhere / f"{name}-{setup}")
    assert other_plans == plans and len(others) == STEPS
    assert name == "lora" or any(plan["pruned"] or plan["added"] or plan["masked"] for plan in plans)
    difference = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    print(f"{name}, {setup}: largest difference of losses {difference:.2e}")
    assert difference <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_trained_exported_and_merged_models_have_the_same_logits(
    folder: Path, name: str, tmp_path: Path
) -> None:
    run, base = folder / name, folder / "model"
    merge_adapter(run / "adapter", None, tmp_path / "merged")
    trained = trained_model(folder / f"{name}.yaml", run / f"checkpoints/step-{STEPS}")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = trained(input_ids=TOKENS).logits
        for other in (peft, merged):
            assert (other(input_ids=TOKENS).logits - expected).abs().max() < 2e-5
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=TOKENS).logits
    assert (plain - expected).abs().max() > 0.05


def test_magnitudes_stay_when_triples_come_and_go(folder: Path) -> None:
    """A checkpoint has them of every module, those of rank 0 too, with their moments."""
    state = load_file(folder / "adalora/checkpoints/step-20/state.safetensors")
    modules = json.loads((folder / "adalora/checkpoints/step-20/state.json").read_text())["blocks"]
    assert len({module["rank"] for module in modules.values()}) > 1
    for name, module in modules.items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            vector = state[f"{kind}/{name}.magnitude_offset"]
            assert vector.shape == (module["out_features"],) and vector.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_a_base_in_nf4_runs_are_alike_and_merge_to_what_was_trained(
    folder: Path, name: str, tmp_path: Path
) -> None:
    """The base's layers are quantised shard by shard under ZeRO-3, whole under ZeRO-2."""
    for file in ("data.jsonl", "recipe.yaml", f"{name}.yaml"):
        shutil.copy(folder / file, tmp_path)
    write_model(tmp_path / "model", hidden=64, intermediate=96)
    on_nf4 = f"model.quantisation=nf4,model.path={tmp_path / 'model'}"
    run_worker(1, "resuming", tmp_path, name, on_nf4)
    run_worker(2, "resuming", tmp_path, f"{name}-zero3", on_nf4)
    run_worker(2, "resuming", tmp_path, f"{name}-zero2", f"{on_nf4},deepspeed.config=zero2")
    losses, plans = history(tmp_path / name)
    for other in ("zero3", "zero2"):
        found, others = history(tmp_path / f"{name}-{other}")
        difference = max(abs(a - b) for a, b in zip(losses, found, strict=True))
        print(f"{name}, {other}: largest difference of losses {difference:.2e}")
        assert others == plans and difference <= 1e-6
    adapter = tmp_path / name / "adapter"
    found = merge_adapter(adapter, None, tmp_path / "matched", match_quantised_base=True)
    assert found is not None and found.largest < 2e-5
    stored = merge_adapter(adapter, None, tmp_path / "stored")
    assert stored is not None and stored.largest > 100 * found.largest


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder: Path, name: str) -> None:
    resumed = stopped_run(folder, name, "resumed")
    run_worker(1, "resuming", folder, resumed, EVERY_EIGHT)
    assert history(folder / resumed) == history(folder / name)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / resumed / weights).read_bytes() == (folder / name / weights).read_bytes()
