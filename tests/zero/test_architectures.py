"""Every architecture that the documentation names is trained, exported, merged and compared with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

from dynrank_ds.cli import main
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.export import export_checkpoint, merge_adapter
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import prepare_data
from tests.support.architectures import ARCHITECTURES, write_architecture
from tests.support.launch import run_worker
from tests.support.recipes import lines
from tests.support.tiny import write_data

ALWAYS = ("Gemma-2", "Cohere2", "GPT-NeoX", "Mixtral", "LLaVA")
SAMPLES = 12
# PEFT 0.21 takes gate_proj, up_proj and down_proj of this model for its experts, wherever they are.
TARGETS = {"DeepSeek-V3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}

# transformers has no other attention for it.
ATTENTION = {"BLOOM": "eager"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Each architecture's model, recipe and run of 3 steps on the whole data under ZeRO-3 in two processes."""
    folder = tmp_path_factory.mktemp("architectures")
    write_data(folder / "data.jsonl", samples=SAMPLES, longest=20)
    chosen = [item for item in request.session.items if "name" in getattr(item, "fixturenames", ())]
    names = sorted({item.callspec.params["name"] for item in chosen if item.path == request.path})
    for name in names:
        targets, attention = TARGETS.get(name, "all-linear"), ATTENTION.get(name, "sdpa")
        write_recipe(folder / name, *ARCHITECTURES[name], targets, attention)
    run_worker(2, "architectures", folder, *names)
    return folder


def write_recipe(
    folder: Path, model_type: str, changes: dict[str, Any], targets: str | list[str], attention: str
) -> None:
    write_architecture(folder / "model", model_type, changes)
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "fp32", "attention": attention},
        "data": {"source": str(folder.parent / "data.jsonl"), "max_length": 200},
        "adapter": {"rank": 4, "alpha": 16.0, "targets": targets},
        "method": {"name": "lora"},
        "train": {
            "steps": 3,
            "global_batch_size": SAMPLES,
            "micro_batch_size": 3,
            "learning_rate": 1e-2,
            "schedule": "constant",
            "checkpoint_interval": 1,
            "checkpoints_kept": 3,
        },
        "output": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def mean_loss(model: nn.Module, dataset: TokenisedDataset) -> Tensor:
    """Of all targets, by the model's own forward on one sample after another."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(dataset)):
        ids, targets = dataset.sample(i)
        tokens = torch.from_numpy(ids.astype(np.int64))
        chosen = torch.from_numpy(np.flatnonzero(targets))
        logits = model(input_ids=tokens[None]).logits[0, chosen - 1]
        total = total + F.cross_entropy(logits, tokens[chosen], reduction="sum").double()
    return total / int(dataset.target_counts.sum())


def load(folder: Path) -> Any:
    """The model by transformers alone."""
    model_class = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    return model_class.from_pretrained(folder, dtype=torch.float32)


def base(folder: Path) -> Any:
    return load(folder / "model")


@pytest.mark.parametrize(
    "name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
def test_an_architecture_trains_on_its_own_loss_and_its_adapter_is_peft_s(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = folder / name
    assert main(["validate", "--recipe", str(here / "recipe.yaml")]) == 0, capsys.readouterr().err
    dataset, _ = prepare_data(load_recipe(str(here / "recipe.yaml")))
    first, second, _ = lines(here / "run/metrics.jsonl")
    assert first["loss"] == pytest.approx(float(mean_loss(base(here), dataset)), rel=1e-6)

    # The second step starts from what the first one left: its loss and gradient are PEFT's with that adapter.
    export_checkpoint(here / "run/checkpoints/step-1", here / "after-step-1")
    model = PeftModel.from_pretrained(base(here), here / "after-step-1", is_trainable=True)
    loss = mean_loss(model, dataset)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
    assert second["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert abs(second["loss"] - first["loss"]) > 1e-3
    assert second["grad_norm"] == pytest.approx(norm, rel=1e-4)

    merge_adapter(here / "run/adapter", None, here / "merged")
    merged = load(here / "merged")
    with torch.no_grad():
        trained = PeftModel.from_pretrained(base(here), here / "run/adapter")
        tokens = torch.arange(3, 43).view(2, 20)
        expected = trained(input_ids=tokens).logits
        assert (merged(input_ids=tokens).logits - expected).abs().max() < 1e-4
        assert (base(here)(input_ids=tokens).logits - expected).abs().max() > 1e-2


def test_the_documentation_names_what_is_tested() -> None:
    readme = Path(__file__).parents[2] / "dynrank_ds" / "adapters" / "README.md"
    table = readme.read_text().split("| architecture |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table]
    assert rows == [[name, model_type] for name, (model_type, _) in ARCHITECTURES.items()]
