"""A run from its recipe to its adapter: everything is built and checked here, then the loop runs."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from dynrank_ds.adapters.inject import inject
from dynrank_ds.adapters.linear import AdaptedLinear
from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.sources import load_rows
from dynrank_ds.data.tokenising import TokenisedDataset, tokenise
from dynrank_ds.errors import RecipeError, RunError
from dynrank_ds.export import export_checkpoint
from dynrank_ds.methods import build_method, method_class
from dynrank_ds.recipe import Recipe
from dynrank_ds.training import checkpoint
from dynrank_ds.training.adamw import RowAgedAdamW
from dynrank_ds.training.checkpoint import Checkpoint, Progress
from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.training.model import SummedLoss, load_model, load_tokenizer
from dynrank_ds.training.rundir import RunDirectory, check_output
from dynrank_ds.zero import processes
from dynrank_ds.zero.config import complete_config, load_config
from dynrank_ds.zero.engine import ZeroEngine

logger = logging.getLogger(__name__)


def prepare_data(recipe: Recipe) -> tuple[TokenisedDataset, int]:
    """The tokenised samples and the padding token's id.

    Raises:
        DataError, ModelError, RecipeError: what is missing or malformed.
    """
    if recipe.data.format not in FORMATS:
        raise RecipeError(f"data.format is '{recipe.data.format}': known are {', '.join(sorted(FORMATS))}")
    tokenizer = load_tokenizer(recipe.model.path)
    rows = load_rows(recipe.data.source, recipe.data.split, recipe.data.limit)
    dataset = tokenise(
        rows, tokenizer, FORMATS[recipe.data.format], recipe.data.max_length, recipe.data.max_dropped
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return dataset, pad_id


def train(recipe: Recipe, resume: bool, device: torch.device) -> None:
    """Trains by `recipe` in all processes of the group, and writes the run directory.

    Raises:
        DynrankError: whatever of the recipe, model, data or directory cannot be run; nothing is written then.
    """
    run = RunDirectory(Path(recipe.output.dir))
    check_output(run.path, resume)
    accumulation = recipe.accumulation(processes.world_size())
    config = load_config(recipe.deepspeed.config)
    dataset, pad_id = prepare_data(recipe)
    total_steps = recipe.total_steps(len(dataset))
    found = checkpoint.newest(run.path) if resume else None
    restored = Checkpoint(found) if found else None

    model = load_model(recipe.model, recipe.train.activation_checkpointing)
    blocks = _adapt(model, recipe, restored)
    method = build_method(recipe.method, blocks, total_steps, device)
    engine = ZeroEngine(
        SummedLoss(model),
        blocks,
        method.factors,
        complete_config(
            config,
            recipe.train.micro_batch_size,
            accumulation,
            recipe.train.max_grad_norm,
            recipe.model.dtype == "bf16",
        ),
        partial(
            RowAgedAdamW,
            lr=recipe.train.learning_rate,
            betas=recipe.train.betas,
            eps=recipe.train.eps,
            weight_decay=recipe.train.weight_decay,
        ),
    )
    method.start(engine.layout)
    progress = Progress()
    if restored:
        restored.restore(engine, method)
        progress = restored.progress
    if processes.rank() == 0:
        run.create(recipe, processes.world_size())
        run.cut_logs(progress.step)
        if restored:
            logger.info("resumed from %s", restored.path)
    trainer = Trainer(recipe, dataset, pad_id, engine, method, progress, total_steps, device, run)
    _run(trainer, recipe, method.planned_adjustments())


def _adapt(model: PreTrainedModel, recipe: Recipe, restored: Checkpoint | None) -> dict[str, AdaptedLinear]:
    section = recipe.adapter
    blocks = inject(
        model,
        section.targets,
        section.rank,
        section.alpha,
        method_class(recipe.method).init,
        recipe.train.seed,
    )
    if restored:
        factors = restored.factors()
        if factors.keys() != blocks.keys():
            raise RunError(
                f"checkpoint {restored.path} has other adapted linears than adapter.targets gives this model"
            )
        for name, block in blocks.items():
            block.set_factors({k: v.to(block.base.weight) for k, v in factors[name].items()})
    return blocks


def _run(trainer: Trainer, recipe: Recipe, planned_adjustments: int) -> None:
    """The loop with its progress bar and checkpoints, then the adapter."""
    first = processes.rank() == 0
    run, progress = trainer.run, trainer.progress
    about = {
        "method": recipe.method.name,
        "base_model": recipe.model.path,
        "recipe": recipe.model_dump(mode="json"),
    }
    save = partial(checkpoint.save, run.path, progress, trainer.engine, trainer.method, about)
    initial = trainer.engine.layout.ranks
    interval = recipe.train.checkpoint_interval

    with tqdm(total=trainer.total_steps, initial=progress.step, unit="step", disable=not first) as bar:

        def after_step(result: StepResult) -> None:
            bar.set_postfix_str(
                f"loss {result.loss:.4f}, {result.tokens_per_second:.0f} tok/s, rank {trainer.engine.layout.total_rank}"
            )
            bar.update(progress.step - bar.n)
            due = interval is not None and progress.step % interval == 0 and result.applied
            if (due or result.stop) and progress.step < trainer.total_steps:
                save()

        finished = trainer.train(after_step)
    if not finished and progress.step < trainer.total_steps:
        if first:
            logger.warning(
                "stopped at step %d by a signal; resume with the same command and resume=auto", progress.step
            )
        return
    last = save()
    if first:
        export_checkpoint(last, run.path / "adapter")
        if planned_adjustments and run.adjustments() and trainer.engine.layout.ranks == initial:
            logger.warning(
                "ranks never changed although %s planned %d adjustments",
                recipe.method.name,
                planned_adjustments,
            )
    processes.barrier()
