"""vLLM against transformers on a random model whose heads any number of GPUs up to 8 can share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launcher.gpu_check.outcome import CheckFailedError
from launcher.gpu_check.setting import Setting

_PROBLEMS = 16
_LEAST_EQUAL = 0.75
"""Share of equal completions: a tie of two logits may fall either way, and all after it differs."""


def check_serving(setting: Setting) -> str:
    """Greedy completions of vLLM over all GPUs, and on one, are those of transformers."""
    model, problems = _random_model(setting), setting.folder / "problems"
    _write_problems(problems)
    texts = {"hf": _completions(setting, "hf", model, problems)}
    texts["vllm"] = _completions(setting, "vllm", model, problems)
    if setting.processes > 1 and setting.device == "cuda":
        texts["vllm on one GPU"] = _completions(setting, "vllm", model, problems, CUDA_VISIBLE_DEVICES="0")
    equal = {
        name: sum(a == b for a, b in zip(found, texts["hf"], strict=True)) / _PROBLEMS
        for name, found in texts.items()
    }
    if len(set(texts["hf"])) < _PROBLEMS / 2 or min(equal.values()) < _LEAST_EQUAL:
        raise CheckFailedError(f"shares of completions that are transformers': {equal}")
    where = f"tensor parallel over {setting.processes} GPUs" if setting.device == "cuda" else "on the CPU"
    return f"{where}: {equal['vllm']:.0%} of {_PROBLEMS} completions are transformers'"


def _random_model(setting: Setting) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        initializer_range=0.3,  # so that logits are well apart, and texts vary
    )
    torch.manual_seed(0)
    folder = setting.folder / "random"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write_problems(folder: Path) -> None:
    (folder / "gsm8k").mkdir(parents=True)
    rows = [{"question": f"What is {n} + {3 * n}?", "answer": f"#### {4 * n}"} for n in range(_PROBLEMS)]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _completions(setting: Setting, engine: str, model: Path, problems: Path, **environment: str) -> list[str]:
    name = f"generate-{engine}{'-on-one' * bool(environment)}"
    output = setting.folder / name
    words = ["run", "--model", str(model), "--engine", engine, "--dtype", "float32", "--task", "gsm8k"]
    words += ["--data-dir", str(problems), "--max-new-tokens", "24", "--output", str(output)]
    setting.command(name, str(Path(sys.executable).with_name("dynrank-eval")), *words, **environment)
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return [row["completion"] for row in rows]
