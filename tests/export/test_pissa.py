"""A trained PiSSA adapter in every form is one function: PEFT, padded, merged, residual base, PEFT's own conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynrank_ds.cli import main
from dynrank_ds.export import export_adapter, merge_adapter
from dynrank_ds.export.inspection import inspect_adapter
from tests.support.launch import train
from tests.support.recipes import STEPS, write_recipe

TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
SETUPS = {
    "pe_dyra": ["adapter.init=pissa"],
    "lora": ["adapter.init=pissa"],
    "nf4": ["adapter.init=pissa", "model.quantisation=nf4"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pissa")
    write_recipe(folder)
    (folder / "lora.yaml").write_text(json.dumps({"base": "recipe.yaml", "method": {"name": "lora"}}))
    for name, overrides in SETUPS.items():
        recipe = folder / ("lora.yaml" if name == "lora" else "recipe.yaml")
        train(2, recipe, f"output.dir={folder / name}", *overrides)
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def changes(run: Path) -> dict[str, Tensor]:
    """dW of every module, computed plainly from the files of the run."""
    checkpoint = run / "checkpoints" / f"step-{STEPS}"
    modules = json.loads((checkpoint / "state.json").read_text())["blocks"]
    master, initial = load_file(checkpoint / "state.safetensors"), load_file(run / "initial.safetensors")

    def product(of: dict[str, Tensor], key: str, rows: list[int]) -> Tensor:
        a, b = of[f"{key}.lora_A"][rows].double(), of[f"{key}.lora_B"][rows].double()
        e = of[f"{key}.lora_E"][rows].double() if f"{key}.lora_E" in of else torch.ones(len(rows)).double()
        return b.T @ torch.diag(e) @ a

    return {
        name: about["scale"]
        * (
            product(master, f"master/{name}", list(range(about["rank"])))
            - product(initial, f"initial/{name}", [n for n in about["initial_of"] if n is not None])
        )
        for name, about in modules.items()
    }


def expected(folder: Path, name: str) -> Tensor:
    """Of the original base with dW added."""
    model = load(folder / "model")
    with torch.no_grad():
        for module, change in changes(folder / name).items():
            model.get_submodule(module).weight += change.float()  # type: ignore[operator]
    return logits(model)


@pytest.mark.parametrize("name", SETUPS)
def test_peft_padded_merged_and_pissas_own_form_are_the_function_that_was_trained(
    folder: Path, name: str, tmp_path: Path
) -> None:
    wanted, base = expected(folder, name), logits(load(folder / "model"))
    assert (wanted - base).abs().max() > 1e-2
    found = {}
    for format in ("peft", "padded"):
        export_adapter(folder / name, tmp_path / format, format)  # type: ignore[arg-type]
        found[format] = logits(PeftModel.from_pretrained(load(folder / "model"), tmp_path / format))  # type: ignore[arg-type]
    merge_adapter(tmp_path / "peft", None, tmp_path / "merged")
    found["merged"] = logits(load(tmp_path / "merged"))
    export_adapter(folder / name, tmp_path / "own", "pissa")
    residual = tmp_path / "own" / "residual_model"
    found["own form"] = logits(PeftModel.from_pretrained(load(residual), tmp_path / "own" / "adapter"))  # type: ignore[arg-type]
    merge_adapter(tmp_path / "own" / "adapter", None, tmp_path / "merged again")
    found["own form, merged"] = logits(load(tmp_path / "merged again"))
    for form, of_form in found.items():
        assert (of_form - wanted).abs().max() < 1e-4, form
    assert (logits(load(residual)) - base).abs().max() > 1e-2


def test_the_exported_rank_is_at_most_twice_that_of_the_triples_and_inspect_finds_no_defect(
    folder: Path, tmp_path: Path
) -> None:
    export_adapter(folder / "lora", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 8 and set(config["rank_pattern"].values()) <= {8}
    assert inspect_adapter(tmp_path / "adapter", str(folder / "model")).defects == []
    arguments = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "small")]
    assert main(["resize", *arguments, "--rank", "3"]) == 0
    card = (tmp_path / "adapter/README.md").read_text()
    assert "PiSSA" in card and "`max_lora_rank` of at least 8" in card


def test_16_bits_round_what_changed_and_not_the_principal_part(folder: Path, tmp_path: Path) -> None:
    export_adapter(folder / "lora", tmp_path / "adapter", dtype="bf16")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for name, change in changes(folder / "lora").items():
        a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        found = alpha / config["r"] * b @ a
        assert (found - change).norm() < 5e-3 * change.norm(), name


def test_pefts_own_conversion_of_the_residual_form_is_the_export_against_the_base(
    folder: Path, tmp_path: Path
) -> None:
    export_adapter(folder / "lora", tmp_path / "own", "pissa")
    start = tmp_path / "start" / "initial"
    shutil.copytree(tmp_path / "own/adapter", start)
    factors = {}
    for key, value in load_file(folder / "lora/initial.safetensors").items():
        module, factor = key.removeprefix("initial/").rsplit(".", 1)
        factors[f"base_model.model.{module}.{factor}.weight"] = (
            value if factor == "lora_A" else value.T.contiguous()
        )
    save_file(factors, start / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(load(tmp_path / "own/residual_model"), tmp_path / "own/adapter")  # type: ignore[arg-type]
    model.save_pretrained(str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(start))
    converted = logits(PeftModel.from_pretrained(load(folder / "model"), tmp_path / "converted"))  # type: ignore[arg-type]
    export_adapter(folder / "lora", tmp_path / "peft")
    ours = logits(PeftModel.from_pretrained(load(folder / "model"), tmp_path / "peft"))  # type: ignore[arg-type]
    assert (converted - ours).abs().max() < 1e-4


def test_what_cannot_be_exported_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "lora", run)
    (run / "initial.safetensors").unlink()
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 2
    assert "initial.safetensors is missing" in capsys.readouterr().err
    train(1, folder / "lora.yaml", f"output.dir={tmp_path / 'plain'}", "train.steps=6")
    arguments = ["export", "--run", str(tmp_path / "plain"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--format", "pissa"]) == 2
    assert "subtracts no initial triples" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
