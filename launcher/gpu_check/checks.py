"""The checks, in their order: later ones use the runs of earlier ones."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dynrank_ds.files import read_json
from launcher.gpu_check.outcome import CheckFailedError, NotHereError
from launcher.gpu_check.planned import check_planned_memory
from launcher.gpu_check.serving import check_serving
from launcher.gpu_check.setting import STEPS, Setting
from launcher.gpu_check.worker import stop_at_checkpoint

Check = Callable[[Setting], str]
"""Returns what it found; raises CheckFailedError or NotHereError."""
LORA: dict[str, dict[str, Any]] = {"method": {"name": "lora"}}
_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_BF16_ERROR = 1e-2
"""Of a product of normal matrices: each factor is rounded by at most 2^-9."""


def check_collectives(setting: Setting) -> str:
    """Sums and gathers of fp32 and bf16 over all processes, and a product in bf16."""
    output = setting.folder / "collectives.json"
    setting.work("collectives", "collectives", str(output))
    found = read_json(output)
    if not found["bf16_error"] < _BF16_ERROR:
        raise CheckFailedError(
            f"a product in bf16 is off by {found['bf16_error']:.1e}, {_BF16_ERROR:.0e} is allowed"
        )
    backend = "nccl" if setting.device == "cuda" else "gloo"
    native = "native bf16" if found["native_bf16"] else "no native bf16"
    speed = f", {found['bytes_per_second'] / 1e9:.1f} GB/s a process" if setting.processes > 1 else ""
    return f"{backend}, {setting.processes} processes{speed}; {native}"


def check_launcher(setting: Setting) -> str:
    """`deepspeed launcher/train.py`, as a user starts it."""
    script = Path(__file__).parents[1] / "train.py"
    count = "--num_gpus" if setting.device == "cuda" else "--num_accelerators"
    words = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", _free_port()]
    words += [count, str(setting.processes), str(script), "--recipe", str(setting.recipe("launched", **LORA))]
    setting.command("launched", *words)
    return f"{len(setting.losses('launched'))} steps"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def config_check(name: str) -> Check:
    """Return the check of a shipped configuration: train, adjust ranks, resume, with ZeRO-3's losses."""

    def check(setting: Setting) -> str:
        config, sections = name, {}
        if name == "zero3_hpz":
            config = setting.config_file(name, zero_hpz_partition_size=hpz_size(setting.processes))
        if name == "zero1":
            sections = {"model": {"dtype": "fp32"}}
        recipe = setting.recipe(name, deepspeed={"config": config}, **sections)
        setting.work(name, "run_and_resume", str(recipe))
        adjusted = _adjustments(setting, name)
        if adjusted != 2:
            raise CheckFailedError(f"{adjusted} of 2 adjustments changed ranks")
        resumed = _compare(setting, f"{name}-resumed", setting.losses(name), "the run that did not stop")
        if name == "zero3":
            return f"2 adjustments; resumed within {resumed:.1e}"
        off = _compare(setting, name, setting.losses("zero3"), "zero3")
        return f"losses within {off:.1e} of zero3's; resumed within {resumed:.1e}"

    return check


def hpz_size(processes: int) -> int:
    """Return the number of processes that pass as a node.

    Raises:
        NotHereError: there is one alone.
    """
    if processes < 2:
        raise NotHereError("needs 2 GPUs")
    return processes // 2 if processes % 2 == 0 and processes > 2 else processes


def _adjustments(setting: Setting, name: str) -> int:
    text = (setting.run_directory(name) / "ranks.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return sum(line["before"] != line["after"] for line in lines)


def _compare(setting: Setting, name: str, expected: Sequence[float], of: str) -> float:
    """Return the largest relative difference of a run's losses.

    Raises:
        CheckFailedError: it is more than rounding.
    """
    found = setting.losses(name)
    if len(found) != len(expected):
        raise CheckFailedError(f"{len(found)} steps, {of} has {len(expected)}")
    off = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if not off <= setting.tolerance:
        raise CheckFailedError(f"losses are off by {off:.1e} from {of}, {setting.tolerance:.0e} is allowed")
    return off


def check_resume_elsewhere(setting: Setting) -> str:
    """A run of all processes goes on in fewer."""
    if setting.processes < 2:
        raise NotHereError("needs 2 GPUs")
    fewer = setting.processes // 2 if setting.processes % 2 == 0 else 1
    path = setting.recipe("elsewhere")
    stop_at_checkpoint(setting.run_directory("zero3"), setting.run_directory("elsewhere"))
    setting.work("elsewhere", "run", str(path), processes=fewer)
    off = _compare(setting, "elsewhere", setting.losses("zero3"), "the run that did not stop")
    return f"{setting.processes} processes, then {fewer}: losses within {off:.1e}"


def check_flash_attention(setting: Setting) -> str:
    """Every kernel that is installed, padded and packed."""
    found = []
    for kernel, module in _FLASH.items():
        if importlib.util.find_spec(module) is None:
            continue
        for packing in (False, True):
            name = f"{kernel}{'-packed' * packing}"
            sections = {"model": {"attention": kernel}, "data": {"packing": packing}}
            setting.work(name, "run", str(setting.recipe(name, **sections)))
            off = _compare(setting, name, setting.losses("zero3"), "sdpa")
            found.append(f"{name} within {off:.1e} of sdpa")
    if not found:
        raise NotHereError("neither flash-attn nor flash-attn-3 is installed")
    return "; ".join(found)


def check_nf4(setting: Setting) -> str:
    """A base in NF4, doubly quantised, under ZeRO-3 and ZeRO-2."""
    model = {"quantisation": "nf4", "double_quantisation": True}
    setting.work("nf4", "run_and_resume", str(setting.recipe("nf4", model=model)))
    second = setting.recipe("nf4-zero2", model=model, deepspeed={"config": "zero2"})
    setting.work("nf4-zero2", "run", str(second))
    off = _compare(setting, "nf4-zero2", setting.losses("nf4"), "zero3")
    return f"zero2 within {off:.1e} of zero3; resumed"


def check_export(setting: Setting) -> str:
    """Export and merge of the run under ZeRO-3."""
    for name, words in (
        ("export", ["export", "--run", str(setting.run_directory("zero3")), "--output", "adapter"]),
        ("merge", ["merge", "--adapter", "adapter", "--output", "merged"]),
    ):
        places = [str(setting.folder / word) if word in ("adapter", "merged") else word for word in words]
        setting.command(name, str(Path(sys.executable).with_name("dynrank")), *places)
    return "adapter and merged model written"


def check_plain_reference(setting: Setting) -> str:
    """Losses of LoRA, of the base in NF4 and of the merged model by plain PyTorch, transformers and PEFT."""
    path, output = setting.recipe("lora", **LORA), setting.folder / "plain.json"
    setting.work("lora", "run", str(path))
    words = [str(path), str(setting.folder / "adapter"), str(setting.folder / "merged"), str(output)]
    setting.work("plain", "plain", *words, processes=1)
    plain = read_json(output)
    lora = _compare(setting, "lora", plain["lora"], "PEFT in one process")
    found = [f"LoRA, {STEPS} steps, within {lora:.1e} of PEFT in one process"]
    for what, ours, theirs in (
        ("NF4's first loss", setting.losses("nf4")[0], plain["nf4"]),
        ("the merged model", plain["merged"], plain["peft"]),
    ):
        off = abs(ours - theirs) / theirs
        if not off <= setting.tolerance:
            raise CheckFailedError(f"{what}: loss {ours:.5f}, by plain transformers and PEFT {theirs:.5f}")
        found.append(f"{what} within {off:.1e}")
    if abs(plain["nf4"] - plain["base"]) < 1e-6:
        raise CheckFailedError("the base in NF4 has the loss of the base: nothing was rounded")
    return "; ".join(found)


def check_step_time(setting: Setting) -> str:
    """A step of our LoRA and of PEFT's, each in a bare DeepSpeed loop under ZeRO-3."""
    found = {}
    for side in ("ours", "peft"):
        name = f"time-{side}"
        sections = {**LORA, "train": {"steps": 10_000, "checkpoint_interval": None, "micro_batch_size": 2}}
        output = setting.folder / f"{name}.json"
        setting.work(name, "time", side, str(setting.recipe(name, **sections)), str(output))
        found[side] = read_json(output)
    ratio, memory = (found["ours"][key] / found["peft"][key] for key in ("seconds", "gib"))
    return (
        f"{found['ours']['seconds'] * 1e3:.1f} ms, PEFT {found['peft']['seconds'] * 1e3:.1f} ms: {ratio:.2f}; "
        f"peak memory {memory:.2f} of PEFT's"
    )


CONFIGS = ("zero3", "zero2", "zero1", "zero3_offload", "zero3_offload_params", "zero3_hpz")
CHECKS: dict[str, Check] = {
    "collectives, bf16": check_collectives,
    "deepspeed launcher": check_launcher,
    **{f"{name}.json": config_check(name) for name in CONFIGS},
    "resume at another world size": check_resume_elsewhere,
    "FlashAttention": check_flash_attention,
    "NF4": check_nf4,
    "export, merge": check_export,
    "plain reference": check_plain_reference,
    "vLLM": check_serving,
    "step time against PEFT": check_step_time,
    "planned memory": check_planned_memory,
}
MEASUREMENTS = ("step time against PEFT",)
"""Checks whose figures have no limit."""


def gpu_count() -> int:
    """Return how many CUDA devices PyTorch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
