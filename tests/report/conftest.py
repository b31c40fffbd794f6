"""Run directories with known ranks: 12 layers of 3 modules, two adjustments."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynrank_ds.checkpoint.files import FORMAT, write_sums

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
START = {f"model.layers.{layer}.{module}": 4 for layer in range(12) for module in MODULES}
AFTER_10 = START | {"model.layers.11.mlp.down_proj": 6, "model.layers.0.self_attn.q_proj": 2}
AFTER_20 = AFTER_10 | {"model.layers.11.mlp.down_proj": 9, "model.layers.2.self_attn.v_proj": 1}


def metric(step: int, loss: float) -> dict:
    return dict(
        step=step,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1.0,
        grad_norms={"lora_A": 0.6, "lora_B": 0.8},
        penalty=0.25,
        tokens_per_second=100.0 + step,
        total_rank_live=144,
        total_rank_stored=144,
        trainable_parameters=1000 + step,
        memory_gib=1.5,
        seconds=0.5,
    )


def scores(ranks: dict[str, int]) -> dict[str, list[float]]:
    """A triple's score is its module's number: the mean importance of modules ascends in the model's order."""
    return {name: [float(number)] * rank for number, (name, rank) in enumerate(ranks.items(), start=1)}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(run: Path, final: dict[str, int], method: str) -> Path:
    checkpoint = run / "checkpoints/step-30"
    checkpoint.mkdir(parents=True)
    shapes = {name: dict(rank=rank, scale=1.0, in_features=8, out_features=8) for name, rank in final.items()}
    state = dict(format=FORMAT, step=30, method=method, base_model="<tiny>", blocks=shapes)
    (checkpoint / "state.json").write_text(json.dumps(state))
    generator = torch.Generator().manual_seed(0)
    triples = {
        f"master/{name}.{factor}": torch.randn(rank, 8, generator=generator)
        for name, rank in final.items()
        if rank
        for factor in ("lora_A", "lora_B")
    }
    save_file(triples, checkpoint / "state.safetensors")
    write_sums(checkpoint)
    write_lines(run / "metrics.jsonl", [metric(step, 3.0 - step / 30) for step in range(1, 31)])
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    run = write_run(tmp_path / "run", AFTER_20, "pe_dyra")
    first = dict(adjustment=1, step=10, before=START, after=AFTER_10, scores=scores(START))
    second = dict(adjustment=2, step=20, before=AFTER_10, after=AFTER_20, scores=scores(AFTER_10))
    write_lines(run / "ranks.jsonl", [first, second])
    return run


@pytest.fixture
def lora_run(tmp_path) -> Path:
    return write_run(tmp_path / "lora", START, "lora")
