"""Calibration passes in one and two processes, compared with dense gradients, inputs and a run's own scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from dynrank_ds.adapters.initial import lora_factors, module_generator
from dynrank_ds.commands.suggest_ranks import suggestion_text
from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.data.collating import PaddedCollator
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.model import adapt
from dynrank_ds.training.samples import prepare_data
from tests.support.launch import outcomes, run_worker, train
from tests.support.recipes import lines, write_recipe
from tests.zero.workers.calibration import BATCHES, COMPONENTS

SCORES = ("gradient", "energy", "sensitivity", "pe_dyra")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]]]:
    """A recipe's folder, and by world size and score what the first process found."""
    folder = tmp_path_factory.mktemp("calibration")
    write_recipe(folder)
    scores: dict[int, dict[str, Any]] = {}
    for world_size in (1, 2):
        run_worker(world_size, "calibration", folder, *SCORES)
        results = {score: outcomes(folder, score, world_size) for score in SCORES}
        assert all(all(one == each[0] for one in each) for each in results.values())
        scores[world_size] = {score: each[0] for score, each in results.items()}
    return folder, scores


@pytest.mark.parametrize("score", SCORES)
def test_two_processes_find_the_scores_of_one(
    score: str, found: tuple[Path, dict[int, dict[str, Any]]]
) -> None:
    one, two = (found[1][world_size][score] for world_size in (1, 2))
    assert len(one) == 14
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-9)


def plain_pass(folder: Path) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Per batch dL/dW of every linear layer, and all its inputs (tokens, in), by plain PyTorch."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    samples, pad_id = prepare_data(recipe)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    linears = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    mask = torch.ones(0)
    for name, linear in linears.items():

        def see(_: Any, given: tuple[torch.Tensor, ...], name: str = name) -> None:
            inputs[name].append(given[0].detach()[mask.bool()])

        linear.register_forward_pre_hook(see)
    gradients = []
    for number in range(BATCHES):
        indices = GlobalBatches(len(samples), recipe.train.global_batch_size, recipe.train.seed).indices(
            number
        )
        batch = PaddedCollator(pad_id).collate(samples, indices)
        mask = batch.attention_mask
        model.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss.backward()
        gradients.append({name: linear.weight.grad.clone() for name, linear in linears.items()})
    return gradients, {name: torch.cat(pieces) for name, pieces in inputs.items()}


def test_gradient_and_energy_are_those_of_dense_gradients_and_inputs(
    found: tuple[Path, dict[int, dict[str, Any]]],
) -> None:
    folder, scores = found
    gradients, inputs = plain_pass(folder)
    ratios = []
    for name, norm in scores[1]["gradient"].items():
        out_features, in_features = gradients[0][name].shape
        a = lora_factors(4, in_features, out_features, module_generator(0, name, 0))["lora_A"]
        squares = [float((of_batch[name] @ a.T).square().sum()) for of_batch in gradients]
        assert norm == pytest.approx((sum(squares) / BATCHES * 3 * in_features / 4) ** 0.5, rel=1e-4)
        dense = sum(float(of_batch[name].square().sum()) for of_batch in gradients) / BATCHES
        ratios.append(norm / dense**0.5)
    # An estimate from 4 random rows a module: right on average.
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.15)
    for name, shares in scores[1]["energy"].items():
        x = inputs[name].double()
        values = torch.linalg.svdvals(x - x.mean(0)).square()
        assert len(shares) == COMPONENTS
        # The sketch has 36 columns: all of the inputs of most layers, not of down_proj's.
        error = 1e-3 if x.shape[1] == 36 else 0.1
        assert shares[:3] == pytest.approx((values / values.sum())[:3].tolist(), rel=error)


def test_trained_scores_are_those_that_a_run_logs(found: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    folder, scores = found
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    values["method"] = {"name": "pe_dyra", "t_i": 0, "interval": BATCHES, "t_f": 1}
    values["train"] |= {"steps": BATCHES + 2, "warmup": 0, "schedule": "constant"}
    values["output"] = {"dir": str(folder / "logged")}
    (folder / "logged.yaml").write_text(yaml.safe_dump(values))
    train(1, folder / "logged.yaml")
    logged = lines(folder / "logged/ranks.jsonl")[0]
    assert logged["step"] == BATCHES
    for name, of_triples in logged["scores"].items():
        assert scores[1]["pe_dyra"][name] == pytest.approx(sum(of_triples), rel=1e-5)


def test_the_command_prints_ranks_that_peft_and_recipes_accept(
    found: tuple[Path, dict[int, dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = found
    command = [
        sys.executable,
        "-m",
        "dynrank_ds.cli",
        "suggest-ranks",
        "--recipe",
        str(folder / "recipe.yaml"),
    ]
    command += ["--mean-rank", "3", "--batches", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    peft_text, recipe_text = done.stdout.split("# PEFT\n")[1].split("# recipe\n")
    config = eval(peft_text, {"LoraConfig": LoraConfig})
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "model"), config)
    ranks, scales = {}, set()
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            ranks[name], scale = module.r["default"], module.scaling["default"]
            scales.add(round(scale, 9))
    assert sum(ranks.values()) == 3 * 14 and len(set(ranks.values())) > 1 and scales == {4.0}
    (tmp_path / "ranked.yaml").write_text(
        yaml.safe_dump({"base": str(folder / "recipe.yaml"), **yaml.safe_load(recipe_text)})
    )
    recipe = load_recipe(str(tmp_path / "ranked.yaml"))
    modules = adapt(LlamaForCausalLM.from_pretrained(folder / "model"), recipe)
    assert {name: module.initial_rank for name, module in modules.items()} == ranks
    assert {module.scale for module in modules.values()} == {4.0}


def test_what_cannot_be_is_refused(found: tuple[Path, dict[int, dict[str, Any]]], tmp_path: Path) -> None:
    from dynrank_ds.cli import main

    recipe = str(found[0] / "recipe.yaml")
    assert main(["suggest-ranks", "--recipe", recipe, "--mean-rank", "0"]) == 2
    assert main(["suggest-ranks", "--recipe", recipe, "--mean-rank", "2", "--batches", "0"]) == 2


def test_the_text_names_only_ranks_that_differ(found: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    recipe = load_recipe(str(found[0] / "recipe.yaml"))
    text = suggestion_text(recipe, {"a.q_proj": 2, "b.q_proj": 2, "c.q_proj": 5})
    assert yaml.safe_load(text.split("# recipe\n")[1]) == {
        "adapter": {"rank": 2, "alpha": 8, "scaling": "rank", "ranks": {"c.q_proj": 5}}
    }
    assert json.dumps({"c.q_proj": 20}) in text.replace("'", '"')
