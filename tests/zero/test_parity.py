"""ZeRO with rank changes is plain single-process training: losses within 1e-6 at every world size and stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from dynrank_ds.adapters.initial import lora_factors, module_generator, svd_factors
from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import prepare_data
from tests.support.launch import train
from tests.support.recipes import EPS
from tests.support.reference import Reference, Settings, Triple
from tests.support.tiny import write_data, write_model

STEPS, RANK, ALPHA, LR, K = 50, 4, 16.0, 5e-3, 5
PE_DYRA = {"name": "pe_dyra", "t_i": 5, "interval": 7, "t_f": 5, "k": K}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": str(folder / "data.jsonl"), "max_length": 200},
        "adapter": {"rank": RANK, "alpha": ALPHA},
        "method": PE_DYRA,
        "train": {
            "steps": STEPS,
            "global_batch_size": 6,
            "micro_batch_size": 1,
            "learning_rate": LR,
            "warmup": 3,
            "schedule": "linear",
            "eps": EPS,
        },
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def reference(
    recipe_file: Path, plans: list[dict] | None = None, method: str = "pe_dyra", b_rate: float = 1.0
) -> tuple[list[float], Reference]:
    """Losses of the plain run; `plans` from ranks.jsonl take the place of its own."""
    recipe = load_recipe(str(recipe_file))
    dataset, _ = prepare_data(recipe)
    init = svd_factors if method == "pe_dyra" else lora_factors

    def new_triples(name: str, count: int, event: int) -> list[Triple]:
        linear = model.get_submodule(name)
        base = linear if isinstance(linear, nn.Linear) else linear.base
        rows = init(count, base.in_features, base.out_features, module_generator(0, name, event))
        return [
            Triple(
                nn.Parameter(rows["lora_A"][i].clone()),
                nn.Parameter(rows["lora_E"][i : i + 1].clone()) if "lora_E" in rows else None,
                nn.Parameter(rows["lora_B"][i].clone()),
            )
            for i in range(count)
        ]

    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    settings = Settings(5, 7, STEPS - 5, K, 0.1) if method == "pe_dyra" else Settings(b_rate=b_rate)
    plain = Reference(model, set(recipe.adapter.targets), RANK, ALPHA / RANK, new_triples, settings)
    batches = GlobalBatches(len(dataset), 6, 0)
    queue = [
        {name: (line["pruned"].get(name, []), line["added"].get(name, 0)) for name in line["before"]}
        for line in plans or []
    ]
    losses = []
    for step in range(1, STEPS + 1):
        samples = [(s.ids.tolist(), s.n_prompt) for s in map(dataset.sample, batches.indices(step - 1))]
        lr = LR * step / 3 if step <= 3 else LR * (1 - (step - 4) / (STEPS - 3))
        due = method == "pe_dyra" and 5 < step < STEPS - 5 and (step - 5) % 7 == 0
        losses.append(plain.step(step, samples, lr, 1.0, queue.pop(0) if due and plans else None))
    return losses, plain


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# world size, configuration, micro-batch: 2, 3, 1, 3 and 1 micro-batches a step
SETUPS = [
    (1, "zero3", 3),
    (2, "zero3", 1),
    pytest.param((3, "zero3", 2), marks=pytest.mark.slow),
    (2, "zero2", 1),
    pytest.param((2, "zero3_offload", 3), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SETUPS, ids=lambda setup: f"{setup[0]}-{setup[1]}")
def run(request: pytest.FixtureRequest, recipe_file: Path) -> Path:
    world_size, config, micro_batch = request.param
    folder = recipe_file.parent / f"run{world_size}-{config}"
    overrides = [f"deepspeed.config={config}", f"train.micro_batch_size={micro_batch}"]
    train(world_size, recipe_file, f"output.dir={folder}", *overrides)
    return folder


@pytest.fixture(scope="module")
def own_plans(recipe_file: Path) -> tuple[list[float], Reference]:
    return reference(recipe_file)


def largest_difference(run: Path, losses: list[float]) -> float:
    trained = [line["loss"] for line in lines(run / "metrics.jsonl")]
    assert len(trained) == len(losses) == STEPS
    difference = max(abs(a - b) for a, b in zip(trained, losses, strict=True))
    print(f"{run.name}: largest loss difference {difference:.2e}")
    return difference


def test_losses_equal_plain_training_with_the_same_rank_changes(run: Path, recipe_file: Path) -> None:
    plans = lines(run / "ranks.jsonl")
    assert len(plans) == 5 and all(line["added"] for line in plans)
    losses, _ = reference(recipe_file, plans)
    assert largest_difference(run, losses) <= 1e-6


def test_scores_and_plans_equal_those_that_plain_training_computes(
    run: Path, own_plans: tuple[list[float], Reference]
) -> None:
    losses, plain = own_plans
    for line, plan in zip(lines(run / "ranks.jsonl"), plain.plans, strict=True):
        assert {n: (line["pruned"].get(n, []), line["added"].get(n, 0)) for n in line["before"]} == plan
    assert largest_difference(run, losses) <= 1e-6
    assert lines(run / "ranks.jsonl")[-1]["after"] == plain.ranks()


@pytest.mark.parametrize(("config", "b_rate"), [("zero3", 1), ("zero2", 2)], ids=["LoRA", "LoRA+"])
def test_lora_losses_equal_plain_training(recipe_file: Path, config: str, b_rate: int) -> None:
    folder = recipe_file.parent / f"lora{b_rate}"
    recipe = yaml.safe_load(recipe_file.read_text()) | {"method": {"name": "lora"}}
    (recipe_file.parent / "lora.yaml").write_text(yaml.safe_dump(recipe))
    overrides = [f"deepspeed.config={config}", f"train.lora_b_rate={b_rate}"]
    train(2, recipe_file.parent / "lora.yaml", f"output.dir={folder}", *overrides)
    losses, _ = reference(recipe_file, method="lora", b_rate=b_rate)
    assert largest_difference(folder, losses) <= 1e-6
