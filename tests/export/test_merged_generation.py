"""vLLM writes with a merged model what transformers writes with the trained one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dynrank_ds.export import export_adapter, merge_adapter
from tests.export.conftest import FakeRun, draw_modules, save_checkpoint
from tests.support.tiny import write_talking_model

LENGTH = 24
VLLM_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts, length, output = json.loads(sys.argv[1])
engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=128)
settings = SamplingParams(temperature=0, max_tokens=length)
done = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
open(output, "w").write(json.dumps([list(answer.outputs[0].token_ids) for answer in done]))
"""


@pytest.mark.slow
def test_greedy_text_of_the_merged_model_in_vllm_is_that_of_the_trained_model(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    base = write_talking_model(tmp_path / "base")
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ranks = {
        f"model.layers.{layer}.{name}": 1 + layer + i for layer in (0, 1) for i, name in enumerate(modules)
    }
    run = FakeRun(tmp_path / "run", base, draw_modules(LlamaForCausalLM.from_pretrained(base), ranks))
    save_checkpoint(run.folder / "checkpoints/step-9", base, run.modules)
    export_adapter(run.folder, tmp_path / "adapter", "peft")
    merge_adapter(tmp_path / "adapter", None, tmp_path / "merged")

    draw = random.Random(0)
    prompts = [[0, *(draw.randint(3, 90) for _ in range(draw.randint(1, 40)))] for _ in range(20)]
    job = json.dumps([str(tmp_path / "merged"), prompts, LENGTH, str(tmp_path / "made.json")])
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = ["env", *(f"{k}={v}" for k, v in environment.items()), sys.executable, "-c", VLLM_SCRIPT, job]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    trained, untrained = run.model(), LlamaForCausalLM.from_pretrained(base)
    expected, before = (
        [
            model.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)[
                0, len(ids) :
            ].tolist()
            for ids in prompts
        ]
        for model in (trained, untrained)
    )
    assert json.loads((tmp_path / "made.json").read_text()) == expected != before
    assert len({tuple(text) for text in expected}) > 10
