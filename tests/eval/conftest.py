"""A tiny random LLaMA, an adapter for it, and real data where there are some."""

import json
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer LLaMA (head_dim 32: vLLM needs it on CPU), fp32, one token a character."""
    import torch

    from tests.support.tiny import write_talking_model

    # Threads that wait for each other cost far more than such a model's arithmetic.
    torch.set_num_threads(1)
    return write_talking_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT LoRA adapter with ranks 3 and 9 whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 9},
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    folder = tmp_path_factory.mktemp("tiny-adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    folder = os.environ.get("DYNRANK_DATA_DIR")
    if folder is None:
        pytest.skip("DYNRANK_DATA_DIR is not set: no real data")
    return Path(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, n in (("gsm_symbolic", 6), ("gsm_symbolic_unseen", 3)):
        rows = [{"task_id": f"{name}-{i}", "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def generations(tmp_path: Path) -> Path:
    """Of gsm_symbolic: four right, one wrong, one without an answer."""
    texts = [f"The answer is: {i + 1}" for i in range(4)] + ["The answer is: 0", "I do not know."]
    rows = [{"task_id": f"gsm_symbolic-{i}", "completion": text} for i, text in enumerate(texts)]
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
