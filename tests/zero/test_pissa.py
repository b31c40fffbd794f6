"""PiSSA under ZeRO: one start at every world size and stage, pruned without loss, trained as by PEFT, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import prepare_data
from tests.support.launch import (
    outcomes,
    reported_errors,
    run_worker,
    start_processes,
    train,
    train_command,
    wait,
)
from tests.support.methods import METHODS
from tests.support.recipes import EPS, STEPS, copy_stopped, lines, write_recipe

PISSA = "adapter.init=pissa"
ZERO3, ZERO2 = f"{PISSA},deepspeed.config=zero3", f"{PISSA},deepspeed.config=zero2"
NF4 = f"{ZERO3},model.quantisation=nf4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pissa")
    write_recipe(folder)
    run_worker(1, "pissa", folder, ZERO2)
    run_worker(2, "pissa", folder, ZERO3, ZERO2, NF4, f"{ZERO3},model.dtype=bf16")
    run_worker(3, "pissa", folder, ZERO3)
    return folder


RUNS = [f"{ZERO2}-1", f"{ZERO3}-2", f"{ZERO2}-2", f"{ZERO3}-3"]


def logits_of_base(folder: Path) -> Tensor:
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        logits: Tensor = model(input_ids=tokens).logits
    return logits


@pytest.mark.parametrize("run", RUNS)
def test_pruning_and_growing_right_after_the_start_leave_the_logits_of_the_base(
    folder: Path, run: str
) -> None:
    expected = logits_of_base(folder)
    found = torch.load(folder / run / "logits.pt", weights_only=True)
    assert set(found) == {"start", "pruned", "masked"}
    for when, logits in found.items():
        assert (logits - expected).abs().max() < 1e-5, when


@pytest.mark.parametrize("run", [f"{NF4}-2", f"{ZERO3},model.dtype=bf16-2"])
def test_in_bf16_and_on_an_nf4_base_too(folder: Path, run: str) -> None:
    found = torch.load(folder / run / "logits.pt", weights_only=True)
    away = (found["pruned"] - found["start"]).abs().max() / found["start"].abs().max()
    assert away < (2e-2 if "bf16" in run else 1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_under_zero_3_initial_triples_are_sharded_before_and_after_a_rank_change(
    folder: Path, world_size: int
) -> None:
    run = folder / f"{ZERO3}-{world_size}"
    for name in ("shards", "pruned-shards"):
        for held in outcomes(run, name, world_size):
            for module, (own, whole) in held.items():
                assert own <= whole // world_size + 2, module


def test_the_stored_initial_triples_depend_neither_on_world_size_nor_on_stage_nor_on_nf4(
    folder: Path,
) -> None:
    stored = {(folder / run / "initial.safetensors").read_bytes() for run in [*RUNS, f"{NF4}-2"]}
    assert len(stored) == 1


def of_peft(recipe_file: Path, steps: int) -> list[float]:
    """Losses of PEFT's PiSSA on one process, with torch's AdamW, sample by sample."""
    recipe = load_recipe(str(recipe_file))
    dataset, _ = prepare_data(recipe)
    config = LoraConfig(
        r=recipe.adapter.rank,
        lora_alpha=recipe.adapter.alpha,  # type: ignore[arg-type]
        target_modules=list(recipe.adapter.targets),
        init_lora_weights="pissa",
    )
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, eps=EPS, weight_decay=0.0)
    batches = GlobalBatches(len(dataset), recipe.train.global_batch_size, 0)
    losses = []
    for step in range(1, steps + 1):
        samples = [dataset.sample(index) for index in batches.indices(step - 1)]
        targets = sum(len(s.ids) - s.n_prompt for s in samples)
        optimizer.zero_grad()
        total = 0.0
        for sample in samples:
            tokens = torch.tensor([sample.ids.tolist()])
            logits = model(input_ids=tokens).logits[0, sample.n_prompt - 1 : -1]
            loss = F.cross_entropy(logits, tokens[0, sample.n_prompt :], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (step / 3 if step <= 3 else 1 - (step - 4) / (steps - 3))
        optimizer.step()
    return losses


@pytest.mark.parametrize("config", ["zero3", pytest.param("zero2", marks=pytest.mark.slow)])
def test_lora_with_pissa_trains_as_pefts_on_one_process(folder: Path, config: str) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"method": {"name": "lora"}}
    (folder / "lora.yaml").write_text(yaml.safe_dump(recipe))
    run = folder / f"lora-{config}"
    train(2, folder / "lora.yaml", PISSA, f"deepspeed.config={config}", f"output.dir={run}")
    ours, theirs = (
        [line["loss"] for line in lines(run / "metrics.jsonl")],
        of_peft(folder / "lora.yaml", STEPS),
    )
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference of losses {difference:.2e}")
    assert difference < 1e-5
    assert max(theirs) - min(theirs) > 0.1


RESUMED = [("pe_dyra", 2, "zero3")]
MORE_RESUMED = [
    ("adalora", 1, "zero2"),
    ("elalora", 3, "zero3"),
    ("lora", 3, "zero2"),
    ("increlora", 2, "zero2"),
    ("dynamic_dora", 3, "zero3"),
]


@pytest.mark.parametrize(
    ("method", "world_size", "config"),
    [*RESUMED, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_RESUMED)],
)
def test_a_run_resumes_at_any_world_size_and_stage(
    folder: Path, method: str, world_size: int, config: str
) -> None:
    section = METHODS.get(method, {"name": method})
    file = folder / f"resume-{method}.yaml"
    file.write_text(json.dumps({"base": "recipe.yaml", "method": section}))
    whole, resumed = folder / f"{method}-whole", folder / f"{method}-resumed"
    train(2, file, PISSA, f"output.dir={whole}", "train.checkpoint_interval=11")
    copy_stopped(whole, resumed, 11)
    stored = (resumed / "initial.safetensors").stat().st_mtime_ns
    train(
        world_size,
        file,
        PISSA,
        f"output.dir={resumed}",
        "resume=auto",
        f"deepspeed.config={config}",
        "train.checkpoint_interval=11",
    )
    losses = [[line["loss"] for line in lines(run / "metrics.jsonl")] for run in (whole, resumed)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-6
    plans = [
        [line["plan_sha256"] for line in lines(run / "ranks.jsonl")] if (run / "ranks.jsonl").exists() else []
        for run in (whole, resumed)
    ]
    assert plans[0] == plans[1] and (plans[0] or method == "lora")
    assert (resumed / "initial.safetensors").stat().st_mtime_ns == stored


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_a_resume_without_its_own_initial_triples_is_refused(
    folder: Path, damage: str, tmp_path: Path
) -> None:
    source = folder / "lora-zero3"
    if not source.is_dir():
        test_lora_with_pissa_trains_as_pefts_on_one_process(folder, "zero3")
    run = tmp_path / "run"
    shutil.copytree(source, run)
    file = run / "initial.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    command = train_command(folder / "lora.yaml", PISSA, f"output.dir={run}", "resume=auto")
    processes = start_processes(2, command, tmp_path / "logs")
    wait(processes)
    assert [p.returncode for p in processes] == [2, 2], [p.output for p in processes]
    expected = "is missing" if damage == "missing" else "differs from the hash"
    assert all(expected in line for line in reported_errors(processes))
