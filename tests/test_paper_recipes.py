"""The recipes of the papers' runs have the papers' numbers, and the quickstart's the budgets that they state.

Models are built on the meta device, from configurations that the tests write: nothing is downloaded.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.composing import FRAGMENTS, shipped
from dynrank_ds.errors import RecipeError
from dynrank_ds.methods import build_method
from dynrank_ds.methods.base import Method
from dynrank_ds.ranking.layout import ShardLayout, whole
from dynrank_ds.ranking.plan import RankState
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.model import adapt, model_without_weights

LLAMA2_7B = LlamaConfig()  # transformers' defaults are LLaMA-2-7B's sides
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, tie_word_embeddings=False
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)


LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
CONFIGS = {
    "meta-llama/Llama-2-7b-hf": LLAMA2_7B,
    "meta-llama/Meta-Llama-3-8B": LLAMA3_8B,
    "meta-llama/Llama-2-70b-hf": LlamaConfig(**LLAMA_70B),
    "meta-llama/Meta-Llama-3-70B": LlamaConfig(**LLAMA_70B, vocab_size=128256),
    "meta-llama/Llama-3.1-70B": LlamaConfig(**LLAMA_70B, vocab_size=128256),
}
"""The published configurations, as far as they decide shapes."""
ROWS = {"meta-math/MetaMathQA": 100_000, "m-a-p/CodeFeedback-Filtered-Instruction": 104_848}
"""Samples that the papers train on."""
PAPER_RECIPES = [name for name in shipped() if not name.startswith("quickstart")]


def planned(name: str, folder: Path) -> tuple[float, int, Method]:
    """Of a recipe on its model without weights: the share of trainable parameters, the modules, the method."""
    recipe = load_recipe(name)
    CONFIGS[recipe.model.path].save_pretrained(folder)
    model = model_without_weights(str(folder))
    base = sum(p.numel() for p in model.parameters())
    modules = adapt(model, recipe)
    trainable = sum(p.numel() for b in modules.values() for p in b.factors().values())
    steps = recipe.total_steps(ROWS[recipe.data.source])
    method = build_method(recipe.method, modules, steps, torch.device("meta"))
    return trainable / base, len(modules), method


SHARES = {"lora": (0.00148, 0.00131), "pe_dyra": (0.00148, 0.00131), "adalora": (0.00222, 0.00196)}
"""Of LLaMA-2-7B and LLaMA-3-8B: 0.15 and 0.13 % in PE-DyRA's Table 3, 0.22 and 0.20 % for AdaLoRA as it begins."""


@pytest.mark.parametrize("name", [name for name in PAPER_RECIPES if "70b" not in name])
def test_a_recipe_of_table_3_trains_the_share_of_parameters_that_the_table_has(
    name: str, tmp_path: Path
) -> None:
    share, modules, method = planned(name, tmp_path)
    recipe = load_recipe(name)
    expected = SHARES[recipe.method.name]["llama3" in name]
    assert modules == 224 and share == pytest.approx(expected, abs=0.5e-5)
    assert (recipe.train.epochs, recipe.train.global_batch_size) == (5, 16)
    rate = 2e-4 if "llama2" in name else 5e-5 if "metamathqa" in name else 1e-4
    assert recipe.train.learning_rate == rate
    # 100,000 and 104,848 rows, batches of 16, 5 epochs; adjustments end at step 20,000 in both.
    steps = recipe.total_steps(ROWS[recipe.data.source])
    assert steps == (31_250 if "metamathqa" in name else 32_765)
    if recipe.method.name == "pe_dyra":
        due = [step for step in range(1, steps + 1) if method.adjusts_at(step)]
        assert due == list(range(3000, 20_000, 1000)) and len(due) == method.planned_adjustments()


@pytest.mark.parametrize(
    ("name", "modules", "share"),
    [
        # The same rank in ever larger linears is an ever smaller share.
        ("llama2_70b_metamathqa_pe_dyra", 560, 0.00075),
        ("llama2_70b_codefeedback_pe_dyra", 560, 0.00075),
        ("llama3_70b_metamathqa_pe_dyra", 560, 0.00073),
        ("llama3_70b_codefeedback_pe_dyra", 560, 0.00073),
        # 64 heads of q and o, 8 of k and v, 3 MLP linears in 80 layers; the paper's abstract says 0.32 %.
        ("llama31_70b_metamathqa_ard_lora", 80 * (64 + 8 + 8 + 64 + 3), 0.00297),
        ("llama2_70b_metamathqa_pe_dyra_nf4", 560, 0.00075),
        ("llama2_70b_codefeedback_pe_dyra_nf4", 560, 0.00075),
        ("llama3_70b_metamathqa_pe_dyra_nf4", 560, 0.00073),
        ("llama3_70b_codefeedback_pe_dyra_nf4", 560, 0.00073),
        ("llama31_70b_metamathqa_ard_lora_nf4", 80 * (64 + 8 + 8 + 64 + 3), 0.00297),
    ],
)
def test_a_recipe_of_70b_builds_its_model(name: str, modules: int, share: float, tmp_path: Path) -> None:
    built_share, n_modules, method = planned(name, tmp_path)
    assert n_modules == modules and built_share == pytest.approx(share, abs=0.5e-5)
    assert method.planned_adjustments() > 10
    recipe = load_recipe(name)
    sizes = (2, 4, 8, 16) if "nf4" in name else (8, 16, 32, 64)
    assert all(recipe.accumulation(processes) for processes in sizes)


@pytest.mark.parametrize("name", [name for name in PAPER_RECIPES if "nf4" in name])
def test_a_recipe_in_nf4_is_the_one_in_bf16_but_for_its_base(name: str) -> None:
    ours, other = (load_recipe(one).model_dump() for one in (name, name.removesuffix("_nf4")))
    assert ours["model"]["quantisation"] == "nf4" and ours["model"]["double_quantisation"]
    may_differ = {
        "model": {"quantisation", "double_quantisation"},
        "train": {"micro_batch_size"},
        "output": {"dir"},
    }
    for section, values in ours.items():
        differing = {key for key, value in values.items() if value != other[section][key]}
        assert differing == may_differ.get(section, set())


def test_all_recipes_for_large_models_are_looked_at() -> None:
    assert len(PAPER_RECIPES) == 22


@pytest.mark.parametrize("method", shipped("methods"))
@pytest.mark.parametrize("model", ["llama2_7b", "llama3_8b"])
def test_any_method_is_composed_with_any_model_and_data(model: str, method: str, tmp_path: Path) -> None:
    for data in shipped("data"):
        recipe = load_recipe(f"{model}+{data}+{method}")
        assert recipe.data.source in ROWS
        assert recipe.output.dir == f"runs/{model}_{data}_{method}"
    if method == "increlora":
        with pytest.raises(RecipeError, match=r"increlora forms the dense gradient .* at most 1,000,000,000"):
            planned(f"{model}+metamathqa+{method}", tmp_path)
        return
    _, modules, built = planned(f"{model}+metamathqa+{method}", tmp_path)
    assert (built.planned_adjustments() > 0) == (method not in ("lora", "rslora", "lora_plus"))
    per_head = {"llama2_7b": 4 * 32 + 3, "llama3_8b": 2 * (32 + 8) + 3}
    assert modules == (32 * per_head[model] if method == "ard_lora" else 224)


def test_fragments_name_only_fragments_in_their_pairs() -> None:
    names = {name for kind in FRAGMENTS for name in shipped(kind)}
    root = Path(__file__).resolve().parents[1] / "recipes"
    files = [file for kind in FRAGMENTS for file in (root / kind).glob("*.yaml")]
    pairs = [set(yaml.safe_load(file.read_text()).get("with", {})) for file in files]
    assert len(pairs) == len(names) and set().union(*pairs) <= names


def test_every_number_names_its_source() -> None:
    """On its line, or for all numbers of a file in its first comment; studies say it in theirs."""
    root = Path(__file__).resolve().parents[1] / "recipes"
    files = [file for file in root.rglob("*.yaml") if file.parent.name != "studies"]
    files = [file for file in files if not file.name.startswith("quickstart")]
    bare = []
    for file in files:
        lines = file.read_text().splitlines()
        head = " ".join(
            line.lstrip("# ") for line in itertools.takewhile(lambda one: one.startswith("#"), lines)
        )
        if "all numbers are ours" not in head.lower():
            bare += [f"{file.name}: {line}" for line in lines if re.search(r": [0-9.e-]+$", line)]
    assert not bare and len(files) > 35


def test_seventy_billion_parameters_get_as_many_moves_in_a_hundred_modules() -> None:
    for method, key in (("pe_dyra", "k"), ("elalora", "b"), ("weightlora", "k"), ("weightlora_plus", "k")):
        small, large = (
            getattr(load_recipe(f"{model}+metamathqa+{method}").method, key)
            for model in ("llama2_7b", "llama2_70b")
        )
        assert large / 560 == pytest.approx(small / 224, abs=1e-3)


def final_ranks(name: str) -> tuple[list[AdaptedModule], tuple[int, ...]]:
    """The modules of a quickstart recipe on SmolLM2-135M's sides, and their ranks at the end if scores were chance."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SMOLLM2_135M)
    modules, steps = adapt(model, recipe), recipe.total_steps(0)
    method = build_method(recipe.method, modules, steps, torch.device("cpu"))
    ranks = tuple(module.initial_rank for module in modules.values())
    method.start(ShardLayout(method.shapes, ranks, method.factors, whole))
    limits = tuple(min(module.in_features, module.out_features) for module in modules.values())
    generator, adjustments = torch.Generator().manual_seed(0), 0
    for step in range(1, steps + 1):
        if method.adjusts_at(step):
            scores = [torch.rand(rank, generator=generator, dtype=torch.float64) for rank in ranks]
            plan = method.plan(scores, RankState(ranks, limits, recipe.adapter.rank, step, steps))
            method.applied(plan, step)
            ranks, adjustments = plan.ranks, adjustments + 1
    assert adjustments == method.planned_adjustments()
    return list(modules.values()), ranks


@pytest.mark.parametrize(
    "method", ["pe_dyra", "lora", "adalora", "elalora", "increlora", "dynamic_dora", "squeeze"]
)
def test_every_quickstart_with_a_budget_ends_with_the_total_rank_of_lora(method: str) -> None:
    name = "quickstart" if method == "pe_dyra" else f"quickstart_{method}"
    assert load_recipe(name).method.name == method
    assert sum(final_ranks(name)[1]) == 4 * 210


def test_weightlora_keeps_the_papers_share_of_adapters_and_plus_fills_their_memory() -> None:
    kept = final_ranks("quickstart_weightlora")[1]
    assert set(kept) == {0, 4}
    assert sum(rank > 0 for rank in kept) == round(210 * 100 / 224)  # of LLaMA3-8B
    modules, grown = final_ranks("quickstart_weightlora_plus")
    costs = [module.in_features + module.out_features for module in modules]
    held = sum(rank * cost for rank, cost in zip(grown, costs, strict=True)) / (4 * sum(costs))
    assert 0.85 < held <= 1 and sum(rank > 0 for rank in grown) == 94


def test_ard_loras_quickstart_begins_with_loras_number_of_parameters() -> None:
    modules, _ = final_ranks("quickstart_ard_lora")
    assert len(modules) == 30 * (9 + 3 + 3 + 9 + 3)
    per_head = 2 * sum(module.in_features + module.out_features for module in modules)
    lora = 4 * sum(module.in_features + module.out_features for module in final_ranks("quickstart_lora")[0])
    assert per_head / lora == pytest.approx(1.07, abs=0.005)
