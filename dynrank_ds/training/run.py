"""A run from its recipe to its adapter: everything is built and checked here, then the loop runs."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynrank_ds.checkpoints import BEST, STEP, finished, leftovers, newest_whole, read_state
from dynrank_ds.data.collating import PackedCollator, PaddedCollator
from dynrank_ds.errors import RunError
from dynrank_ds.export import export_checkpoint
from dynrank_ds.methods import build_method
from dynrank_ds.methods.base import Method
from dynrank_ds.recipe import Recipe
from dynrank_ds.training import checkpoint
from dynrank_ds.training.adamw import RowAgedAdamW
from dynrank_ds.training.architecture import decoder_layers
from dynrank_ds.training.checkpoint import Checkpoint, Progress
from dynrank_ds.training.dtype import agree_on_dtype
from dynrank_ds.training.identity import identity, refuse_changes
from dynrank_ds.training.loop import StepResult, Trainer
from dynrank_ds.training.loss import SummedLoss, check_loss
from dynrank_ds.training.model import load_model
from dynrank_ds.training.prepare import adapt, prepare_data, split_held_out
from dynrank_ds.training.rundir import RunDirectory, check_output
from dynrank_ds.training.saving import Saving
from dynrank_ds.zero import processes
from dynrank_ds.zero.config import complete_config, load_config
from dynrank_ds.zero.engine import ZeroEngine

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool, device: torch.device) -> None:
    """Trains by `recipe` in all processes of the group, and writes the run directory.

    Raises:
        DynrankError: whatever of the recipe, model, data or directory cannot be run; nothing is written then.
    """
    trainer = build(recipe, resume, device)
    try:
        _run(trainer)
    finally:
        trainer.run.unlock()


def build(recipe: Recipe, resume: bool, device: torch.device) -> Trainer:
    """Everything of a run, at its beginning or where it stopped; raises what `train` does."""
    run = RunDirectory(Path(recipe.output.dir))
    check_output(run.path, resume)
    before = run.about() if resume else None
    recipe = agree_on_dtype(recipe, before and before["recipe"], device)
    config = complete_config(
        load_config(recipe.deepspeed.config, recipe.model.dtype == "bf16"),
        recipe.train.micro_batch_size,
        recipe.accumulation(processes.world_size()),
        recipe.train.max_grad_norm,
        recipe.model.dtype == "bf16",
    )
    samples, pad_id = prepare_data(recipe)
    dataset, held_out = split_held_out(samples, recipe)
    collator = PackedCollator() if recipe.data.packing else PaddedCollator(pad_id)
    total_steps = recipe.total_steps(len(dataset))
    now = identity(recipe, samples)
    about = {
        "method": recipe.method.name,
        "base_model": recipe.model.path,
        "recipe": recipe.model_dump(mode="json"),
        "identity": now,
    }
    with ExitStack() as failing:
        failing.callback(run.unlock)
        _enter(run, resume, now, device)
        restored = _restored(run, recipe, now, device) if resume else None
        engine, method = _engine(recipe, config, restored, total_steps, device)
        check_loss(engine.evaluate, dataset, collator, recipe.model.dtype, device)
        progress = restored.progress if restored else Progress()
        if processes.rank() == 0:
            run.create(recipe, now, processes.world_size())
            run.cut_logs(progress.step, progress.batch)
            if restored:
                logger.info("resumed from %s", restored.path)
        failing.pop_all()  # the directory stays locked while it trains
    return Trainer(
        recipe, dataset, held_out, collator, engine, method, progress, total_steps, device, run, about
    )


def _engine(
    recipe: Recipe,
    config: dict[str, Any],
    restored: Checkpoint | None,
    total_steps: int,
    device: torch.device,
) -> tuple[ZeroEngine, Method]:
    """The model with its adapters in DeepSpeed, and their method, at the beginning or as they were saved."""
    model = load_model(recipe.model, recipe.train.activation_checkpointing)
    modules = adapt(model, recipe, restored.factors() if restored else ())
    method = build_method(recipe.method, modules, total_steps, device)
    engine = ZeroEngine(
        SummedLoss(model),
        modules,
        method.factors,
        config,
        partial(
            RowAgedAdamW,
            lr=recipe.train.learning_rate,
            betas=recipe.train.betas,
            eps=recipe.train.eps,
            weight_decay=recipe.train.weight_decay,
        ),
        rates=dict.fromkeys(method.factors, 1.0) | {"lora_B": recipe.train.lora_b_rate},
        unit=type(decoder_layers(model)[0]),
    )
    method.start(engine.layout)
    if restored:
        restored.restore(engine, method)
    return engine, method


def _enter(run: RunDirectory, resume: bool, now: Mapping[str, str], device: torch.device) -> None:
    """Locks the directory; what it holds cannot change from here on.

    Raises:
        RunError: on every process: another run is in it, or the processes do not hold the same model and data.
    """
    if not processes.agree(hashlib.sha256(json.dumps(now).encode()).hexdigest(), device):
        raise RunError(
            f"the processes hold different models, tokenizers or data: {', '.join(now)} must be the same on every node"
        )
    refused = torch.tensor(float(processes.rank() == 0 and not run.lock()), device=device)
    if processes.all_reduce_sum(refused) > 0:
        raise RunError(
            f"output.dir {run.path} is in use by another run: wait for it or stop it, or give a new folder"
        )
    check_output(run.path, resume)


def _restored(
    run: RunDirectory, recipe: Recipe, now: Mapping[str, str], device: torch.device
) -> Checkpoint | None:
    """The newest whole checkpoint, if it is of this run; what is damaged or unfinished is put out of the way."""
    folder, about = run.path, run.about()
    whole = {kind: newest_whole(folder, kind) for kind in (STEP, BEST)}
    # Each process has looked for itself: they must have seen the same folder, before anything is moved there.
    seen = hashlib.sha256(f"{about} {whole}".encode()).hexdigest()
    if not processes.agree(seen, device):
        raise RunError(
            f"the processes see different checkpoints in {folder}: output.dir must be on a disk that all of them share"
        )
    if about is None:
        return None
    found = [Checkpoint(path) for path in whole.values() if path]
    if found:
        restored = max(found, key=lambda checkpoint: checkpoint.progress.step)
        refuse_changes(restored.path, restored.about, recipe, now)
    elif finished(folder) or finished(folder, BEST):
        raise RunError(
            f"every checkpoint in {folder} is damaged: give a new output.dir, or remove them to begin anew"
        )
    elif (folder / "adapter").exists():
        raise RunError(
            f"{folder} holds the adapter of a run, and no checkpoint to go on from: give a new output.dir"
        )
    else:
        restored = None
        refuse_changes(folder, about, recipe, now)
    processes.barrier()
    if processes.rank() == 0:
        checkpoint.remove(leftovers(folder))
        for kind, path in whole.items():
            checkpoint.set_aside(finished(folder, kind), path)
    return restored


def _run(trainer: Trainer) -> None:
    """The loop with its progress bar and checkpoints, then the adapter."""
    first, progress = processes.rank() == 0, trainer.progress
    saving = Saving(trainer)
    with tqdm(total=trainer.total_steps, initial=progress.step, unit="step", disable=not first) as bar:

        def after_step(result: StepResult) -> None:
            bar.set_postfix_str(
                f"loss {result.loss:.4f}, {result.tokens_per_second:.0f} tok/s, rank {trainer.engine.layout.total_rank}"
            )
            bar.update(progress.step - bar.n)
            saving.after_step(result)

        trainer.train(after_step)
    if progress.step < trainer.total_steps:
        if first:
            logger.warning(
                "stopped at step %d by a signal; resume with the same command and resume=auto", progress.step
            )
        return
    last = saving.last()
    if first:
        _finish(trainer, last)
    processes.barrier()


def _finish(trainer: Trainer, last: Path) -> None:
    """The adapters of the last checkpoint and the best, and what to know of the run."""
    run, recipe, progress = trainer.run, trainer.recipe, trainer.progress
    export_checkpoint(last, run.path / "adapter")
    for best in finished(run.path, BEST)[:1]:
        state = read_state(best)
        export_checkpoint(best, run.path / "adapter-best")
        logger.info(
            "the lowest held-out loss, %.4f, was that of step %d: %s",
            state["held_out_loss"],
            state["step"],
            run.path / "adapter-best",
        )
    logger.info(
        "adapter written to %s; score it with\n    %s", run.path / "adapter", _eval_command(recipe, run.path)
    )
    if progress.batch > progress.step:
        logger.warning(
            "%d of %d batches were discarded: their loss or gradient was not finite",
            progress.batch - progress.step,
            progress.batch,
        )
    planned = trainer.method.planned_adjustments()
    if planned and not any(a["pruned"] or a["added"] for a in run.adjustments()):
        logger.warning(
            "ranks never changed although %s planned %d adjustments",
            recipe.method.name,
            planned,
        )


def _eval_command(recipe: Recipe, run: Path) -> str:
    words = ["dynrank-eval", "run", "--model", recipe.model.path, "--adapter", str(run / "adapter")]
    words += ["--task", ",".join(recipe.eval.tasks) or "gsm8k"]
    if recipe.eval.data_dir:
        words += ["--data-dir", recipe.eval.data_dir]
    return shlex.join([*words, "--output", str(run / "eval")])
