"""DynamicRankCallback in the Trainer of transformers, compared with plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from dynrank_ds.adapters.initial import module_generator, svd_factors
from dynrank_ds.errors import RecipeError
from dynrank_ds.integrations.hf import DynamicRankCallback
from dynrank_ds.recipe_sections import LLAMA_LINEARS
from tests.support.methods import METHODS
from tests.support.recipes import EPS
from tests.support.reference import Reference, Settings, Triple
from tests.support.tiny import write_model

STEPS, RANK, ALPHA, LR, K, BATCH = 26, 4, 16.0, 5e-3, 5, 6
PE_DYRA = {"name": "pe_dyra", "t_i": 5, "interval": 7, "t_f": 5, "k": K}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model")


def draw_samples(count: int) -> list[tuple[list[int], int]]:
    """(token ids, prompt length) of unequal lengths."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(6, 40, (count,), generator=draw).tolist()
    return [(torch.randint(3, 95, (n,), generator=draw).tolist(), n // 3) for n in lengths]


def collate(samples: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in samples)
    rows = [(ids, longest - len(ids), prompt) for ids, prompt in samples]
    return {
        "input_ids": torch.tensor([ids + [2] * pad for ids, pad, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * pad for ids, pad, _ in rows]),
        "labels": torch.tensor([[-100] * prompt + ids[prompt:] + [-100] * pad for ids, pad, prompt in rows]),
    }


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def rate(step: int) -> float:
    return step / 3 if step <= 3 else 1 - (step - 4) / (STEPS - 3)


def make_trainer(
    folder: Path, model: LlamaForCausalLM, callback: DynamicRankCallback, **arguments: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": LR,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    optimizer = callback.optimizer(LR, eps=EPS)
    return InOrder(
        model=model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=draw_samples(STEPS * BATCH),
        data_collator=collate,
        callbacks=[callback],
        optimizers=(optimizer, LambdaLR(optimizer, lambda done: rate(done + 1))),
    )


def make_callback(model: LlamaForCausalLM, method: dict[str, Any], **adapter: Any) -> DynamicRankCallback:
    return DynamicRankCallback(model, method, {"rank": RANK, "alpha": ALPHA} | adapter)


def plain_run(base: Path) -> Reference:
    model = LlamaForCausalLM.from_pretrained(base)

    def new_triples(name: str, count: int, event: int) -> list[Triple]:
        linear = model.get_submodule(name)
        sides = linear if isinstance(linear, nn.Linear) else linear.base
        rows = svd_factors(count, sides.in_features, sides.out_features, module_generator(0, name, event))
        return [
            Triple(
                nn.Parameter(rows["lora_A"][i].clone()),
                nn.Parameter(rows["lora_E"][i : i + 1].clone()),
                nn.Parameter(rows["lora_B"][i].clone()),
            )
            for i in range(count)
        ]

    plain = Reference(
        model, set(LLAMA_LINEARS), RANK, ALPHA / RANK, new_triples, Settings(5, 7, STEPS - 5, K, 0.1)
    )
    samples = draw_samples(STEPS * BATCH)
    for step in range(1, STEPS + 1):
        plain.step(step, samples[(step - 1) * BATCH : step * BATCH], LR * rate(step), 1e9)
    return plain


def test_a_trainer_makes_the_plans_and_weights_of_plain_training(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    callback = make_callback(model, PE_DYRA)
    make_trainer(tmp_path / "out", model, callback).train()
    plain = plain_run(base)
    assert [step for step, _ in callback.plans] == [12, 19] and len(plain.plans) == 2
    assert callback.ranks() == plain.ranks() and len(set(callback.ranks().values())) > 1
    for name, linear in plain.linears.items():
        a, b = (torch.stack([getattr(t, f) for t in linear.triples]) for f in "ab")
        e = torch.cat([t.e for t in linear.triples])
        module = model.get_submodule(name)
        found = (module.lora_B.T * module.lora_E) @ module.lora_A
        assert (found - (b.T * e) @ a).abs().max() < 1e-5, name
    callback.export(tmp_path / "adapter")
    tokens = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exported = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
        assert (exported(tokens).logits - model(tokens).logits).abs().max() < 1e-5
        assert (
            LlamaForCausalLM.from_pretrained(base)(tokens).logits - model(tokens).logits
        ).abs().max() > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_exports_what_it_trained(name: str, base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    callback = make_callback(model, METHODS[name])
    make_trainer(tmp_path / "out", model, callback, max_steps=20).train()
    assert callback.plans
    callback.export(tmp_path / "adapter", "padded")
    tokens = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(2))
    model.eval()
    with torch.no_grad():
        exported = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
        assert (exported(tokens).logits - model(tokens).logits).abs().max() < 1e-5


def test_a_bf16_model_has_fp32_master_weights(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    callback = make_callback(model, PE_DYRA)
    make_trainer(tmp_path / "out", model, callback).train()
    optimizer = callback._optimizer
    assert optimizer is not None and len(callback.plans) == 2
    for parameter, master in zip(callback.adapters.parameters(), optimizer.masters, strict=True):
        assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(parameter, master.bfloat16())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in optimizer.masters)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bf16": True}, "load the model with dtype=torch.bfloat16 instead"),
        ({"deepspeed": "x"}, "under the Trainer's DeepSpeed: train with launcher/train.py"),
        ({"world_size": 2}, "not under DDP, DataParallel or FSDP"),
        ({"_n_gpu": 2}, "not under DDP, DataParallel or FSDP"),
    ],
)
def test_what_it_cannot_work_under_is_refused(
    arguments: dict[str, Any], sentence: str, base: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    callback = make_callback(model, PE_DYRA)
    trainer = make_trainer(tmp_path, model, callback)

    class Arguments:
        bf16, fp16, deepspeed, world_size, n_gpu, fsdp = False, False, None, 1, 0, []

    for name, value in arguments.items():
        setattr(Arguments, name.removeprefix("_"), value)
    with pytest.raises(RecipeError, match=sentence):
        callback.on_train_begin(Arguments, trainer.state, trainer.control)  # type: ignore[arg-type]


def test_mistakes_are_refused_before_training(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.dropout is not available"):
        make_callback(LlamaForCausalLM.from_pretrained(base), PE_DYRA, dropout=0.1)
    with pytest.raises(RecipeError, match="did you mean 'interval'"):
        make_callback(LlamaForCausalLM.from_pretrained(base), {**PE_DYRA, "intervall": 3})
    model = LlamaForCausalLM.from_pretrained(base)
    callback = make_callback(model, PE_DYRA)
    trainer = make_trainer(tmp_path, model, callback)
    callback._optimizer = None
    with pytest.raises(RecipeError, match=r"pass optimizers=\(callback\.optimizer"):
        trainer.train()
