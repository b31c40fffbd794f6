"""The example of the documentation, and TRL's SFTTrainer where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from dynrank_ds.integrations.hf import DynamicRankCallback
from tests.support.tiny import write_data, write_model

EXAMPLE = Path(__file__).parents[2] / "launcher/hf_trainer.py"


def test_the_example_of_forty_lines_trains_and_exports(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    words = [sys.executable, EXAMPLE, "model", "data.jsonl", "out", "10"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "cache")}
    subprocess.run(words, check=True, cwd=tmp_path, env=environment)
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out/adapter"
    )
    ranks = [m.r["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert sum(ranks) == 4 * 14 and len(set(ranks)) > 1


def test_trls_trainer_changes_ranks(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    write_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    method = {"name": "pe_dyra", "t_i": 1, "interval": 3, "t_f": 2, "k": 5}
    callback = DynamicRankCallback(model, method, {"rank": 4, "alpha": 8.0})
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 1} w{i}"} for i in range(40)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path / "out"),
            max_steps=10,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        callbacks=[callback],
        optimizers=(callback.optimizer(1e-2), None),
    )
    trainer.train()
    assert len(callback.plans) == 2 and len(set(callback.ranks().values())) > 1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)
    callback.export(tmp_path / "adapter")
