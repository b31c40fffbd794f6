"""What is compared: our training loop, and PEFT in the three loops that its users have.

Each makes the same optimizer step of one global batch: same base weights, dtype, attention, micro-batches, learning
rate, AdamW settings, clipping, and for LoRA the same initial factors.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynrank_ds.bench.sides import AfterStep
from dynrank_ds.methods.adalora import AdaLoRAConfig
from dynrank_ds.recipe import Recipe

Arrays = dict[str, NDArray[np.int64]]
"""input_ids, attention_mask and labels of a micro-batch, each (samples, tokens)."""


@dataclass(frozen=True)
class Ours:
    """`launcher/train.py` by `recipe`, always on its first batch and at a step that makes no adjustment."""

    name: str
    recipe: Recipe

    def train(self, rank: int, world_size: int, after_step: AfterStep) -> None:
        """Train as described in Contender."""
        from dynrank_ds.bench.step import quiet_step
        from dynrank_ds.training.loop import StepResult
        from dynrank_ds.training.run import set_up
        from dynrank_ds.zero import processes

        device = processes.start(self.recipe.deepspeed.timeout)
        trainer = set_up(self.recipe, False, device)
        quiet = quiet_step(trainer)

        def again(result: StepResult) -> None:
            assert result.applied
            result.stop = not after_step(result.loss)
            trainer.progress.step, trainer.progress.batch = quiet - 1, 0

        trainer.progress.step = quiet - 1
        trainer.train(again)


@dataclass(frozen=True)
class Peft(ABC):
    """PEFT's LoRA or AdaLoRA; the subclasses are the loops."""

    name: str
    recipe: Recipe
    """Of which model, adapter and train are read, and of `method` whether it is AdaLoRA."""
    micro_batches: tuple[tuple[Arrays, ...], ...]
    """Of each process."""
    targets: int
    """In the global batch."""

    @abstractmethod
    def train(self, rank: int, world_size: int, after_step: AfterStep) -> None:
        """Train as described in Contender."""

    def model(self) -> nn.Module:
        """Return the frozen model with PEFT's adapters; those of LoRA begin as ours do."""
        from transformers import AutoModelForCausalLM

        from dynrank_ds.training.model import DTYPES

        section = self.recipe.model
        base = AutoModelForCausalLM.from_pretrained(
            section.path, dtype=DTYPES[section.dtype], attn_implementation=section.attention
        )
        base.config.use_cache = False
        model: nn.Module = self.adapted(base)
        return model.train()

    def adapted(self, base: Any) -> Any:
        """Return `base` with PEFT's adapters."""
        from peft import AdaLoraConfig, LoraConfig, get_peft_model

        adapter, method = self.recipe.adapter, self.recipe.method
        targets = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
        alpha: Any = self.recipe.scale * adapter.rank  # PEFT declares an int, and computes with any number
        if not isinstance(method, AdaLoRAConfig):
            lora = LoraConfig(r=adapter.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
            model = get_peft_model(base, lora)
            _begin_as_ours(model, self.recipe.train.seed)
            return model
        adalora = AdaLoraConfig(
            init_r=adapter.rank,
            target_r=method.target_rank or 1,
            lora_alpha=alpha,
            target_modules=targets,
            task_type="CAUSAL_LM",
            beta1=method.beta1,
            beta2=method.beta2,
            orth_reg_weight=method.orthogonality,
            # Masks come at multiples of deltaT, so that no measured step has one; scores are updated in each.
            deltaT=10**6,
            total_step=10**6,
            tfinal=10,
        )
        return get_peft_model(base, adalora)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return torch's AdamW on the parameters that PEFT has left trainable."""
        section = self.recipe.train
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            trained,
            lr=section.peak_rate,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
        )

    def inputs(self, rank: int) -> list[dict[str, Any]]:
        """Return the model's arguments for every micro-batch of a process; losses are divided by all targets."""
        return [
            {**tensors(arrays), "num_items_in_batch": self.targets} for arrays in self.micro_batches[rank]
        ]

    def allocates(self) -> bool:
        """Return whether every step calls `update_and_allocate`."""
        return isinstance(self.recipe.method, AdaLoRAConfig)


class PeftAlone(Peft):
    """A plain PyTorch loop in one process."""

    def train(self, rank: int, world_size: int, after_step: AfterStep) -> None:
        """Train as described in Contender."""
        model, limit = self.model(), self.recipe.train.max_grad_norm
        optimizer = self.optimizer(model)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        wanted, step = True, 0
        while wanted:
            step += 1
            loss = torch.zeros(())
            for inputs in self.inputs(rank):
                part = model(**inputs).loss
                part.backward()
                loss += part.detach()
            if limit:
                nn.utils.clip_grad_norm_(trained, limit)
            optimizer.step()
            if self.allocates():
                allocate(model, step)
            optimizer.zero_grad()
            wanted = after_step(loss.item())


class PeftDeepSpeed(Peft):
    """A bare DeepSpeed loop with the recipe's DeepSpeed configuration.

    As transformers documents it for a loop without its Trainer, HfDeepSpeedConfig stands before the model is loaded
    and lives as long as it: transformers then partitions while loading, and PEFT gathers what it reads.
    """

    def train(self, rank: int, world_size: int, after_step: AfterStep) -> None:
        """Train as described in Contender."""
        from transformers.integrations import HfDeepSpeedConfig

        from dynrank_ds.zero import processes
        from dynrank_ds.zero.plain import PlainEngine

        processes.start(self.recipe.deepspeed.timeout)
        config = deepspeed_config(self.recipe, world_size)
        known = HfDeepSpeedConfig(config)  # transformers holds only a weak reference
        model = self.model()
        engine = PlainEngine(model, self.optimizer(model), config)
        wanted, step = True, 0
        while wanted:
            step += 1

            def before_update(step: int = step) -> None:
                if self.allocates():
                    allocate(model, step)

            wanted = after_step(engine.train_step(self.inputs(rank), before_update))
        del known


class PeftTrainer(Peft):
    """Hugging Face's Trainer with the recipe's DeepSpeed configuration."""

    def train(self, rank: int, world_size: int, after_step: AfterStep) -> None:
        """Train as described in Contender."""
        from dynrank_ds.bench.hf_trainer import train
        from dynrank_ds.zero import processes

        processes.start(self.recipe.deepspeed.timeout)
        config = deepspeed_config(self.recipe, world_size)
        micro_batches = [tensors(arrays) for arrays in self.micro_batches[rank]]
        with tempfile.TemporaryDirectory() as folder:
            train(self.model, self.recipe.train, micro_batches, config, folder, after_step)


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Return a micro-batch as torch tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def allocate(model: nn.Module, step: int) -> None:
    """Let PEFT's AdaLoRA see the gradients of a step."""
    base: Any = model.base_model
    base.update_and_allocate(step)


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Return the configuration that our own run of the recipe hands to DeepSpeed."""
    from dynrank_ds.zero.config import complete_config, load_config

    bf16 = recipe.model.dtype == "bf16"
    return complete_config(
        load_config(recipe.deepspeed.config, bf16),
        recipe.train.micro_batch_size,
        recipe.accumulation(world_size),
        recipe.train.max_grad_norm,
        bf16,
    )


@torch.no_grad()
def _begin_as_ours(model: nn.Module, seed: int) -> None:
    from dynrank_ds.adapters.initial import lora_factors, module_generator

    names: Sequence[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert names
    for name, module in names:
        weight = module.lora_A["default"].weight
        ours = name.removeprefix("base_model.model.")
        drawn = lora_factors(
            len(weight), module.in_features, module.out_features, module_generator(seed, ours, 0)
        )
        weight.copy_(drawn["lora_A"])
