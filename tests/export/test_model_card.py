import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from dynrank_ds.cli import main
from dynrank_ds.errors import RunError
from dynrank_ds.export import export_adapter
from dynrank_ds.export.base_model import model_hash
from tests.support.launch import train
from tests.support.recipes import write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run of 20 steps with held-out samples."""
    folder = tmp_path_factory.mktemp("card")
    train(1, write_recipe(folder), "data.held_out=6", "train.held_out_interval=10")
    return folder


def test_the_card_says_base_method_ranks_and_recipe(trained):
    card = ModelCard.load(trained / "run/adapter/README.md")
    assert card.data.library_name == "peft" and card.data.base_model == str(trained / "model")
    text = card.text
    assert model_hash(trained / "model") in text and "`pe_dyra`, 20 steps" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["train"]["steps"] == 20 and recipe["method"]["k"] == 5
    total = sum(json.loads((trained / "run/ranks.jsonl").read_text().splitlines()[-1])["after"].values())
    assert f"{total} in 14 linear layers" in text
    assert "## Scores" not in text
    record = json.loads((trained / "run/adapter/dynrank.json").read_text())
    assert record["base_model_hash"] == model_hash(trained / "model") and record["recipe"] == recipe
    assert "README.md" in record["files"]


def test_the_card_of_the_best_checkpoint_has_its_loss(trained):
    best = ModelCard.load(trained / "run/adapter-best/README.md").text
    line = next(line for line in best.splitlines() if line.startswith("| held-out loss"))
    losses = [json.loads(line) for line in (trained / "run/metrics.jsonl").read_text().splitlines()]
    assert float(line.split("|")[2]) == pytest.approx(
        min(row["held_out_loss"] for row in losses if "held_out_loss" in row), abs=1e-4
    )


def test_scores_are_those_of_the_evaluation_named_or_beside_the_run(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    results = {"tasks": {"gsm8k": {"score": 0.375}}, "run": {}}
    for folder in (run / "eval", tmp_path / "other"):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
        results["tasks"]["gsm8k"]["score"] = 0.5
    export_adapter(run, tmp_path / "beside")
    assert "| gsm8k (dynrank-eval) | 37.50% |" in (tmp_path / "beside/README.md").read_text()
    command = ["export", "--run", str(run), "--output", str(tmp_path / "named"), "--scores"]
    assert main([*command, str(tmp_path / "other")]) == 0
    assert "| gsm8k (dynrank-eval) | 50.00% |" in (tmp_path / "named/README.md").read_text()


def test_scores_that_are_none_are_refused(trained, tmp_path):
    with pytest.raises(RunError, match="name an output folder of dynrank-eval"):
        export_adapter(trained / "run", tmp_path / "out", scores=tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunError, match="is no result of dynrank-eval"):
        export_adapter(trained / "run", tmp_path / "out", scores=tmp_path)
    assert not (tmp_path / "out").exists()
