"""A run from its recipe to its adapter: set up, resume, train, finish."""

from __future__ import annotations

import logging
import shlex
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynrank_ds.checkpoint.files import BEST, Progress, complete_checkpoints, read_state
from dynrank_ds.checkpoint.initial import IN_STATE, publish
from dynrank_ds.checkpoint.reading import Checkpoint
from dynrank_ds.data.collating import PackedCollator, PaddedCollator
from dynrank_ds.export import export_checkpoint
from dynrank_ds.methods import build_method, method_class
from dynrank_ds.methods.base import Method
from dynrank_ds.recipe import Recipe
from dynrank_ds.shared_disk import patiently
from dynrank_ds.training.adamw import RowAgedAdamW
from dynrank_ds.training.agreement import check_same_everywhere, process_versions
from dynrank_ds.training.architecture import decoder_layers
from dynrank_ds.training.capabilities import describe_capabilities
from dynrank_ds.training.dtype import agree_on_dtype
from dynrank_ds.training.loop import StepResult, Trainer, TrainingData
from dynrank_ds.training.loss import SummedLoss, check_loss
from dynrank_ds.training.model import DTYPES, adapt, hidden_size, load_model, with_defaults
from dynrank_ds.training.movement import MovementCheck
from dynrank_ds.training.pissa import restore_initial_triples, start_from_principal_triples
from dynrank_ds.training.resume import find_checkpoint, fingerprints, lock_directory
from dynrank_ds.training.rundir import check_output
from dynrank_ds.training.samples import prepare_data, split_held_out
from dynrank_ds.training.saving import Saving
from dynrank_ds.training.signals import StopRequest, exit_code_when_stopped
from dynrank_ds.training.starting import warn_of_another_base
from dynrank_ds.training.state import FINISHED, HOW_TO_RESUME, RUNNING, STARTING, STOPPED, RunState
from dynrank_ds.training.trackers import Trackers, check_packages
from dynrank_ds.zero import processes
from dynrank_ds.zero.config import check_processes, complete_config, load_config
from dynrank_ds.zero.early_stop import EarlyStop
from dynrank_ds.zero.engine import ZeroEngine
from dynrank_ds.zero.partitioner import make_partitioner

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    resume: bool,
    device: torch.device,
    stop_request: StopRequest | None = None,
    state: RunState | None = None,
) -> bool:
    """Train by `recipe` in all processes of the group, and write the run directory.

    stop_request: of this process; one that is asked before training begins ends every process of the group. state: what
    the caller can write a failure into.

    Returns False where the run was stopped and saved before its last step.

    Raises:
        DynrankError: what of the recipe, model, data or directory cannot be run; nothing is written then.
    """
    stop_request, state = stop_request or StopRequest(), state or RunState(Path(recipe.output.dir))
    early_stop = EarlyStop(
        lambda: stop_request.received, partial(_note_early_stop, state), exit_code_when_stopped()
    )
    early_stop.start()
    try:
        trainer = set_up(recipe, resume, device, state)
        try:
            early_stop.begin_training()
            trainer.stop_request = stop_request
            return _train(trainer, state)
        finally:
            state.unlock()
    finally:
        early_stop.cancel()


def _note_early_stop(state: RunState) -> None:
    if processes.rank() == 0:
        state.write_early_stop()
        logger.warning(
            "stopped by a signal before training began: nothing is lost; begin or resume with the same command and "
            "resume=auto"
        )


def _train(trainer: Trainer, state: RunState) -> bool:
    """Train, finish, and keep the run's state up to date."""
    first = processes.rank() == 0
    if first:
        state.write(RUNNING, "it is running; after a kill, " + HOW_TO_RESUME)
        trainer.trackers = Trackers.open(trainer.directory, trainer.recipe, trainer.progress.step + 1)
    saving = Saving(trainer)
    done = _loop(trainer, saving)
    trainer.trackers.close()
    if done:
        _finish(trainer, saving.save_last())
    if first:
        state.write(FINISHED if done else STOPPED, "it is done" if done else HOW_TO_RESUME)
    # No process ends, and makes its launcher end the others, before all of this is written.
    processes.barrier()
    return done


def set_up(recipe: Recipe, resume: bool, device: torch.device, state: RunState | None = None) -> Trainer:
    """Build everything of a run, at step 0 or as its newest checkpoint has it.

    state: of the run, which begins here.

    Raises:
        DynrankError: as `train`.
    """
    state = state or RunState(Path(recipe.output.dir))
    directory = state.directory
    check_same_everywhere(process_versions(recipe), device)
    check_output(directory.path, resume)
    if processes.rank() == 0:
        check_packages(recipe)
    before = directory.metadata() if resume else None
    recipe = with_defaults(recipe, before and before["recipe"])
    recipe = agree_on_dtype(recipe, before and before["recipe"], device)
    config = deepspeed_config(recipe)
    samples, pad_id = prepare_data(recipe)
    data = TrainingData(
        *split_held_out(samples, recipe), PackedCollator() if recipe.data.packing else PaddedCollator(pad_id)
    )
    identity = fingerprints(recipe, samples)
    with ExitStack() as on_error:
        on_error.callback(state.unlock)
        lock_directory(directory, resume, identity, device)
        checkpoint = find_checkpoint(directory, recipe, identity, device) if resume else None
        total_steps = recipe.total_steps(len(data.samples))
        progress = checkpoint.progress if checkpoint else Progress()
        state.begin(progress, total_steps)
        if processes.rank() == 0:
            state.write(STARTING, "the model is loaded; after a kill, " + HOW_TO_RESUME)
        engine, method = build_engine(recipe, config, checkpoint, total_steps, device)
        check_loss(engine.evaluate, data.samples, data.collator, recipe.model.dtype, device)
        initial_hash = checkpoint.metadata.get(IN_STATE) if checkpoint else None
        if processes.rank() == 0:
            if recipe.adapter.init_from and not checkpoint:
                warn_of_another_base(Path(recipe.adapter.init_from), identity["base model"])
            directory.create(recipe, identity, processes.world_size())
            directory.cut_logs(progress.step, progress.batch)
            if checkpoint:
                logger.info("resumed from %s", checkpoint.path)
            elif recipe.adapter.variant == "pissa":
                # Named now that the directory is known for a run's.
                initial_hash = publish(directory.path)
        on_error.pop_all()  # the directory stays locked while it trains
    metadata = {
        "method": recipe.method.name,
        "base_model": recipe.model.path,
        "recipe": recipe.model_dump(mode="json"),
        "identity": identity,
        **({} if initial_hash is None else {IN_STATE: initial_hash}),
    }
    return Trainer(recipe, data, engine, method, directory, progress, metadata)


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """Return the DeepSpeed configuration of the recipe's run in this process group.

    Raises:
        RecipeError: there is none, or the global batch does not fit the group.
    """
    bf16 = recipe.triples_in_bf16
    config = load_config(recipe.deepspeed.config, bf16)
    check_processes(config, recipe.deepspeed.config, processes.world_size())
    return complete_config(
        config,
        recipe.train.micro_batch_size,
        recipe.accumulation(processes.world_size()),
        recipe.train.max_grad_norm,
        bf16,
    )


def build_engine(
    recipe: Recipe,
    config: dict[str, Any],
    checkpoint: Checkpoint | None,
    total_steps: int,
    device: torch.device,
) -> tuple[ZeroEngine, Method]:
    """Return the model with its adapter in DeepSpeed, and its method, at step 0 or as they were saved."""
    partitioner = make_partitioner(config, DTYPES[recipe.model.dtype])
    model = load_model(recipe.model, recipe.train.activation_checkpointing, partitioner, device)
    loss = SummedLoss(model)
    logger.info("computes in %s", describe_capabilities(recipe, loss, processes.world_size(), device))
    pissa = recipe.adapter.variant == "pissa"
    if checkpoint:
        modules = adapt(model, recipe, checkpoint.factors(), checkpoint.initial_ranks())
        if pissa:
            restore_initial_triples(modules, checkpoint, partitioner)
    else:
        modules = adapt(model, recipe)
        if pissa:
            factors = method_class(recipe.method).factors
            start_from_principal_triples(modules, recipe, factors, partitioner, device)
    method = build_method(recipe.method, modules, total_steps, device)
    engine = ZeroEngine(
        loss,
        modules,
        method.factors,
        config,
        partial(
            RowAgedAdamW,
            lr=recipe.train.peak_rate,
            betas=recipe.train.betas,
            eps=recipe.train.eps,
            weight_decay=recipe.train.weight_decay,
        ),
        rates=dict.fromkeys(method.factors, 1.0) | {"lora_B": recipe.train.lora_b_rate},
        unit=type(decoder_layers(model)[0]),
    )
    method.start(engine.layout)
    if checkpoint:
        checkpoint.restore(engine, method)
    return engine, method


def _loop(trainer: Trainer, saving: Saving) -> bool:
    """Train with a progress bar and checkpoints; return False where a signal stopped it before the last step."""
    first, progress, recipe = processes.rank() == 0, trainer.progress, trainer.recipe
    movement = MovementCheck(recipe, trainer.engine, hidden_size(recipe.model.path), trainer.total_steps)
    with tqdm(total=trainer.total_steps, initial=progress.step, unit="step", disable=not first) as bar:

        def after_step(result: StepResult) -> None:
            rank, speed = trainer.engine.layout.total_rank, result.tokens_per_second
            # `update` draws, no more often than TQDM_MININTERVAL asks for.
            change = f" ({trainer.last_adjustment})" if trainer.last_adjustment else ""
            bar.set_postfix_str(
                f"loss {result.loss:.4f}, {speed:.0f} tok/s, rank {rank}{change}", refresh=False
            )
            bar.update(progress.step - bar.n)
            movement.after_step(progress.step)
            saving.after_step(result)

        trainer.train(after_step)
    if progress.step < trainer.total_steps:
        if first:
            logger.warning(
                "stopped at step %d by a signal; resume with the same command and resume=auto", progress.step
            )
        return False
    return True


def _finish(trainer: Trainer, last: Path) -> None:
    """Export the adapter of the last checkpoint and of the best, in the first process."""
    if processes.rank() == 0:
        directory = trainer.directory.path
        _export(last, directory / "adapter")
        for best in complete_checkpoints(directory, BEST)[:1]:
            state = read_state(best)
            _export(best, directory / "adapter-best")
            logger.info(
                "the lowest held-out loss, %.4f, was that of step %d: %s",
                state["held_out_loss"],
                state["step"],
                directory / "adapter-best",
            )
        _log_summary(trainer)


def _export(checkpoint: Path, output: Path) -> None:
    patiently(lambda: export_checkpoint(checkpoint, output), output)


def _log_summary(trainer: Trainer) -> None:
    directory, recipe, progress = trainer.directory, trainer.recipe, trainer.progress
    adapter = directory.path / "adapter"
    logger.info(
        "adapter written to %s; score it with\n    %s", adapter, _eval_command(recipe, directory.path)
    )
    if progress.batch > progress.step:
        logger.warning(
            "%d of %d batches were discarded: their loss or gradient was not finite",
            progress.batch - progress.step,
            progress.batch,
        )
    planned = trainer.method.planned_adjustments()
    if planned and not any(
        line["before"] != line["after"] or line["masked"] for line in directory.adjustments()
    ):
        logger.warning("ranks never changed although %s planned %d adjustments", recipe.method.name, planned)


def _eval_command(recipe: Recipe, run: Path) -> str:
    words = ["dynrank-eval", "run", "--model", recipe.model.path, "--adapter", str(run / "adapter")]
    words += ["--task", ",".join(recipe.eval.tasks) or "gsm8k"]
    if recipe.eval.data_dir:
        words += ["--data-dir", recipe.eval.data_dir]
    return shlex.join([*words, "--output", str(run / "eval")])
