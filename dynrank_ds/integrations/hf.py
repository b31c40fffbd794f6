"""Dynamic ranks in a Hugging Face `Trainer` or TRL `SFTTrainer` of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dynrank_ds.adapters.initial import module_generator
from dynrank_ds.errors import RecipeError, RunError
from dynrank_ds.export.peft_writer import Format
from dynrank_ds.integrations.live import AdapterAdamW, LiveAdapters, LiveSource
from dynrank_ds.methods import build_method, method_class
from dynrank_ds.methods.base import Method, MicroBatch, StepView
from dynrank_ds.ranking.plan import RankPlan, RankState
from dynrank_ds.recipe import check_recipe
from dynrank_ds.training.architecture import check_config, check_layers
from dynrank_ds.training.model import adapt

_ELSEWHERE = "train with launcher/train.py, which does this under DeepSpeed ZeRO"


class DynamicRankCallback(TrainerCallback):
    """Adapts a model and changes the ranks of its adapters while a `Trainer` trains it.

    The model is changed in place when the callback is made: its weights are frozen, its linear layers adapted. Pass the
    callback in `callbacks`, and its `optimizer` in `optimizers`. A change of ranks replaces parameters; weights and
    moments of the triples that stay are carried over.

    The methods see the gradients as `on_pre_optimizer_step` has them: clipped to `max_grad_norm`. A clipped step counts
    less in their statistics than in training by recipe, where they see gradients before; `max_grad_norm=0` leaves them.

    Args:
        model: a causal language model in fp32 or bf16, without adapters.
        method: the recipe's `method` section, such as {"name": "pe_dyra", "t_i": 0.2, "interval": 10, "t_f": 0.3}.
        adapter: the recipe's `adapter` section, such as {"rank": 4, "alpha": 8, "targets": ["q_proj"]}.
        seed: of initial values and new triples.

    Raises:
        RecipeError, ModelError: the sections do not fit one another or the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Mapping[str, Any],
        adapter: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if model.dtype not in (torch.float32, torch.bfloat16):
            raise RecipeError(
                f"the model is in {model.dtype}: load it with dtype=torch.float32 or torch.bfloat16"
            )
        values = {
            "model": {"path": model.name_or_path or "model"},
            "data": {"source": "the trainer's"},
            "adapter": dict(adapter or {}),
            "method": dict(method),
            "train": {"steps": 1, "global_batch_size": 1, "seed": seed},
            "output": {"dir": "the trainer's"},
        }
        self.recipe = check_recipe(values, "DynamicRankCallback")
        if self.recipe.adapter.dropout:
            raise RecipeError("adapter.dropout is not available in a Trainer: its masks are drawn by sample")
        if self.recipe.adapter.weight_decomposed:
            raise RecipeError(
                f"adapter.weight_decomposed is not available in a Trainer, whose optimizer here holds triples alone: "
                f"{_ELSEWHERE}"
            )
        if self.recipe.adapter.init == "pissa":
            raise RecipeError(f"adapter.init pissa is not available in a Trainer: {_ELSEWHERE}")
        check_config(model.config, self.recipe.model.path)
        check_layers(model, self.recipe.model.path)
        modules = adapt(model, self.recipe)
        for module in modules.values():
            module.train(model.training)
        model.enable_input_require_grads()
        self.adapters = LiveAdapters(modules, method_class(self.recipe.method).factors)
        self.plans: list[tuple[int, tuple[int, ...]]] = []
        """(step, ranks after it) of every adjustment."""
        self._named, self._model = modules, model
        self._method: Method | None = None
        self._optimizer: AdapterAdamW | None = None
        self._scores: Sequence[Tensor] | None = None
        self._tokens, self._micro_batches, self._step = 0, 0, 0

    def optimizer(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> AdapterAdamW:
        """Return the AdamW, with an age for each triple, to pass as `optimizers=(callback.optimizer(lr), None)`."""
        self._optimizer = AdapterAdamW(self.adapters.parameters(), learning_rate, betas, eps, weight_decay)
        return self._optimizer

    def ranks(self) -> dict[str, int]:
        """Return the rank of every adapted module."""
        return dict(zip(self._named, self.adapters.layout.ranks, strict=True))

    def export(self, output: str | Path, format: Format = "peft", dtype: str = "fp32") -> None:
        """Write the adapter as a PEFT folder.

        Raises:
            RunError: it changes nothing, or the folder holds something else.
        """
        method = self.recipe.method.name
        gates = self._method.gates() if self._method else [None] * len(self.adapters.modules)
        record = {
            "trainer": "transformers",
            "base_model": self._model.name_or_path,
            "method": method,
            "step": self.adapters.updates,
        }
        LiveSource(self.adapters, gates, self._model.name_or_path).export(Path(output), format, dtype, record)

    # --- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the trainer, and build the method, now that the number of steps is known."""
        self._refuse(args, state)
        assert self._optimizer is not None
        device = next(self._model.parameters()).device
        self._method = build_method(self.recipe.method, self._named, state.max_steps, device)
        self.adapters.layout = self.adapters._layout(
            self.adapters.layout.ranks
        )  # where the Trainer moved the model
        self.adapters.begin(self._optimizer)
        self._method.start(self.adapters.layout)
        self._handle = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _refuse(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.deepspeed:
            raise RecipeError(
                f"DynamicRankCallback cannot change ranks under the Trainer's DeepSpeed: {_ELSEWHERE}"
            )
        if args.world_size > 1 or args.n_gpu > 1 or args.fsdp:
            raise RecipeError(
                f"DynamicRankCallback works in one process on one device, not under DDP, DataParallel or FSDP, whose "
                f"buckets hold parameters that a change of ranks replaces: {_ELSEWHERE}"
            )
        if (args.fp16 or args.bf16) and self._model.dtype == torch.float32:
            raise RecipeError(
                "the Trainer's fp16 and bf16 run an fp32 model under autocast, which the adapters do not: load the "
                "model with dtype=torch.bfloat16 instead; master weights of the adapters are fp32 then too"
            )
        if self._optimizer is None:
            raise RecipeError("pass optimizers=(callback.optimizer(learning_rate), None) to the Trainer")
        if state.global_step:
            raise RunError(
                f"resuming a Trainer at step {state.global_step} is not possible with DynamicRankCallback: its "
                f"checkpoints hold no statistics of the method; {_ELSEWHERE}"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the number of the step that begins."""
        self._step, self._tokens, self._micro_batches = state.global_step + 1, 0, 0

    def _before_forward(self, model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Tell the method which micro-batch comes; what depends on weights alone is computed in the first of a step."""
        assert self._method is not None
        if not model.training:
            return
        mask = named.get("attention_mask")
        if mask is None or mask.dim() != 2:
            shown = named["input_ids"] if "input_ids" in named else given[0]
            mask = torch.ones_like(shown)
        self._tokens += int(mask.sum())
        self._micro_batches += 1
        self._method.begin_micro_batch(
            MicroBatch(token_mask=mask, step=self._step, last=self._micro_batches == 1)
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the method observe the step, unless it wants to after the update."""
        assert self._method is not None and self._optimizer is not None
        finite = bool(torch.isfinite(self.adapters.gradients()).all())
        self._optimizer.discard = not finite
        if not finite:
            self._method.discard_step()
        elif not self._method.observes_after_step:
            self._observe()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the method observe the step after the update where it wants to."""
        assert self._method is not None and self._optimizer is not None
        if self._optimizer.discard:
            return
        if self._method.observes_after_step:
            self._observe()
        self.adapters.updates += 1

    def _observe(self) -> None:
        assert self._method is not None and self._optimizer is not None
        group = self._optimizer.param_groups[0]
        view = StepView(
            self._step,
            self.adapters.weights(),
            self.adapters.gradients(),
            self.adapters.layout,
            self._tokens,
            group["lr"] / group.get("initial_lr", group["lr"]) if group["lr"] else 0.0,
            lambda tensor: tensor,
        )
        self._method.observe(view)
        self._scores = self._method.scores(view) if self._method.adjusts_at(view.step) else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change ranks if the step asks for it."""
        if self._scores is not None:
            self._adjust(self._scores, state)
            self._scores = None

    def _adjust(self, scores: Sequence[Tensor], state: TrainerState) -> None:
        assert self._method is not None
        before = self.adapters.layout.ranks
        limits = tuple(module.max_rank for module in self.adapters.modules)
        step = self._step
        rank_state = RankState(before, limits, self.recipe.adapter.rank, step, state.max_steps)
        plan = self._method.plan(scores, rank_state)
        if plan.changed(before):
            statistics = self._method.row_statistics
            statistics.update(self.adapters.resize(plan, partial(self._new_rows, plan), statistics))
        if plan.masked:
            self.adapters.mask(plan.masked)
        self._method.applied(plan, step)
        self.plans.append((step, plan.ranks))

    def _new_rows(self, plan: RankPlan, module: int, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._method is not None
        generator = module_generator(self.recipe.train.seed, self.adapters.shapes[module].name, self._step)
        return self._method.new_rows(module, old, plan, generator)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model's forward alone again."""
        self._handle.remove()
