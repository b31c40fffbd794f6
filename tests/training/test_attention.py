"""Which attention kernel `model.attention: auto` is, by device, dtype, packages and model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from dynrank_ds.cli import main
from dynrank_ds.errors import ModelError
from dynrank_ds.recipe_sections import ModelSection
from dynrank_ds.training import attention
from dynrank_ds.training.attention import check_attention, choose_attention
from tests.support.architectures import ARCHITECTURES, architecture_config
from tests.support.launch import train
from tests.support.recipes import write_recipe

BOTH = ("flash_attention_2", "flash_attention_3")
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


def chosen(name: str, device: str = "cuda", **section: str) -> tuple[str, str]:
    model = ModelSection(path="m", **{"dtype": "bf16", **section})
    return choose_attention(model, architecture_config(*ARCHITECTURES[name]), torch.device(device))


def install(patch: pytest.MonkeyPatch, packages: Collection[str], capability: tuple[int, int]) -> None:
    """As if these packages and this GPU were there."""
    for number in (2, 3):
        there = f"flash_attention_{number}" in packages
        patch.setattr(attention, f"is_flash_attn_{number}_available", lambda there=there: there)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


@pytest.mark.parametrize(
    ("packages", "capability", "kernel", "reason"),
    [
        (BOTH, HOPPER, "flash_attention_3", "installed"),
        (BOTH, AMPERE, "flash_attention_2", "installed"),
        (BOTH[:1], HOPPER, "flash_attention_2", "installed"),
        (BOTH[1:], AMPERE, "sdpa", "no FlashAttention for this GPU is installed"),
        (BOTH, TURING, "sdpa", "no FlashAttention for this GPU is installed"),
        ((), HOPPER, "sdpa", "no FlashAttention for this GPU is installed"),
    ],
)
def test_auto_is_the_fastest_kernel_that_is_installed_and_that_the_gpu_runs(
    packages: Collection[str],
    capability: tuple[int, int],
    kernel: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, packages, capability)
    assert chosen("LLaMA") == (kernel, reason)


@pytest.mark.parametrize(
    ("name", "section", "device", "kernel", "reason"),
    [
        ("LLaMA", {"dtype": "fp32"}, "cuda", "sdpa", "FlashAttention needs bf16"),
        ("LLaMA", {}, "cpu", "sdpa", "FlashAttention needs a GPU"),
        ("LLaMA", {"attention": "eager"}, "cuda", "eager", "as asked for"),
        ("Gemma-2", {}, "cuda", "flash_attention_3", "installed"),
        ("Gemma-2", {}, "cpu", "eager", "FlashAttention needs a GPU, and sdpa has no soft cap of scores"),
        ("BLOOM", {}, "cuda", "eager", "transformers has no other for bloom models"),
    ],
)
def test_auto_is_what_dtype_device_and_model_allow(
    name: str,
    section: dict[str, str],
    device: str,
    kernel: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, BOTH, HOPPER)
    assert chosen(name, device, **section) == (kernel, reason)


def test_a_kernel_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.attention=flash_attention_3", "model.dtype=bf16"]
    assert main(["validate", "--recipe", str(write_recipe(tmp_path)), *words]) == 2
    sentence = (
        "error: model.attention is flash_attention_3, but there is no module flash_attn_interface: install"
    )
    assert sentence in capsys.readouterr().err
    with pytest.raises(ModelError, match=r"transformers does not have for bloom models: give auto"):
        check_attention(architecture_config(*ARCHITECTURES["BLOOM"]), "flash_attention_2")


def test_a_run_says_in_one_line_what_it_computes_with(tmp_path: Path) -> None:
    (process,) = train(1, write_recipe(tmp_path), "train.steps=1", "train.warmup=0", "method.name=lora")
    (line,) = [line for line in process.output.splitlines() if "computes in" in line]
    assert line == (
        "INFO computes in fp32 in 1 process (cpu, gloo); attention sdpa (FlashAttention needs a GPU); "
        "logits of at most 335,544 tokens at a time"
    )
