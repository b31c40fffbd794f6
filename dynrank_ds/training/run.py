"""A run from its recipe to its adapter: everything is built and checked here, then the loop runs."""

from __future__ import annotations

import logging
import math
import shlex
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from dynrank_ds.checkpoints import find_newest, read_state
from dynrank_ds.errors import RunError
from dynrank_ds.export import export_checkpoint
from dynrank_ds.methods import build_method
from dynrank_ds.recipe import Recipe
from dynrank_ds.training import checkpoint
from dynrank_ds.training.adamw import RowAgedAdamW
from dynrank_ds.training.checkpoint import Checkpoint, Progress
from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.training.model import SummedLoss, load_model
from dynrank_ds.training.prepare import adapt, prepare_data, split_held_out
from dynrank_ds.training.rundir import RunDirectory, check_output
from dynrank_ds.zero import processes
from dynrank_ds.zero.config import complete_config, load_config
from dynrank_ds.zero.engine import ZeroEngine

logger = logging.getLogger(__name__)

BEST = "best"
"""The checkpoint of the lowest held-out loss so far, beside step-N."""


def train(recipe: Recipe, resume: bool, device: torch.device) -> None:
    """Trains by `recipe` in all processes of the group, and writes the run directory.

    Raises:
        DynrankError: whatever of the recipe, model, data or directory cannot be run; nothing is written then.
    """
    run = RunDirectory(Path(recipe.output.dir))
    check_output(run.path, resume)
    accumulation = recipe.accumulation(processes.world_size())
    config = load_config(recipe.deepspeed.config, recipe.model.dtype == "bf16")
    samples, pad_id = prepare_data(recipe)
    dataset, held_out = split_held_out(samples, recipe)
    total_steps = recipe.total_steps(len(dataset))
    found = find_newest(run.path) if resume else None
    restored = Checkpoint(found) if found else None

    model = load_model(recipe.model, recipe.train.activation_checkpointing)
    blocks = adapt(model, recipe, restored.factors() if restored else None)
    if restored and restored.about["blocks"].keys() != blocks.keys():
        raise RunError(
            f"checkpoint {restored.path} adapts other linears than adapter.targets does in this model"
        )
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
        rates=dict.fromkeys(method.factors, 1.0) | {"lora_B": recipe.train.lora_b_rate},
        unit=type(model.get_decoder().layers[0]),
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
    trainer = Trainer(recipe, dataset, held_out, pad_id, engine, method, progress, total_steps, device, run)
    _run(trainer, recipe, method.planned_adjustments())


def _run(trainer: Trainer, recipe: Recipe, planned_adjustments: int) -> None:
    """The loop with its progress bar and checkpoints, then the adapter."""
    first = processes.rank() == 0
    run, progress = trainer.run, trainer.progress
    about = {
        "method": recipe.method.name,
        "base_model": recipe.model.path,
        "recipe": recipe.model_dump(mode="json"),
    }
    save = partial(checkpoint.save, run.path, progress, trainer.engine, trainer.method)
    best_path = run.path / "checkpoints" / BEST
    best = read_state(best_path)["held_out_loss"] if best_path.is_dir() else math.inf
    interval = recipe.train.checkpoint_interval

    with tqdm(total=trainer.total_steps, initial=progress.step, unit="step", disable=not first) as bar:

        def after_step(result: StepResult) -> None:
            bar.set_postfix_str(
                f"loss {result.loss:.4f}, {result.tokens_per_second:.0f} tok/s, rank {trainer.engine.layout.total_rank}"
            )
            bar.update(progress.step - bar.n)
            nonlocal best
            if result.held_out_loss is not None and result.held_out_loss < best:
                best = result.held_out_loss
                save({**about, "held_out_loss": best}, BEST)
            due = interval is not None and progress.step % interval == 0 and result.applied
            if (due or result.stop) and progress.step < trainer.total_steps:
                save(about)

        finished = trainer.train(after_step)
    if not finished and progress.step < trainer.total_steps:
        if first:
            logger.warning(
                "stopped at step %d by a signal; resume with the same command and resume=auto", progress.step
            )
        return
    last = save(about)
    if first:
        export_checkpoint(last, run.path / "adapter")
        if best_path.is_dir():
            export_checkpoint(best_path, run.path / "adapter-best")
            logger.info(
                "the lowest held-out loss, %.4f, was that of step %d: %s",
                best,
                read_state(best_path)["step"],
                run.path / "adapter-best",
            )
        logger.info(
            "adapter written to %s; score it with\n    %s",
            run.path / "adapter",
            _eval_command(recipe, run.path),
        )
        if planned_adjustments and not any(a["pruned"] or a["added"] for a in run.adjustments()):
            logger.warning(
                "ranks never changed although %s planned %d adjustments",
                recipe.method.name,
                planned_adjustments,
            )
    processes.barrier()


def _eval_command(recipe: Recipe, run: Path) -> str:
    words = ["dynrank-eval", "run", "--model", recipe.model.path, "--adapter", str(run / "adapter")]
    words += ["--task", ",".join(recipe.eval.tasks) or "gsm8k"]
    if recipe.eval.data_dir:
        words += ["--data-dir", recipe.eval.data_dir]
    return shlex.join([*words, "--output", str(run / "eval")])
