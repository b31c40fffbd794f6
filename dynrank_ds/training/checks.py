"""What of a run can be refused before its processes meet: by `dynrank validate`, and by every process for itself.

All that a recipe, its model folder and its data show without weights: minutes of loading lie behind these checks, and
of a process that ends while others wait for it, the message is less clear than that of a mistake.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from dynrank_ds import dtypes
from dynrank_ds.adapters.linear import AdaptedModule
from dynrank_ds.checkpoint.files import BEST, STEP, complete_checkpoints
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.errors import DataError, ModelError, RecipeError
from dynrank_ds.methods import build_method
from dynrank_ds.methods.base import Method
from dynrank_ds.ranking.schedule import resolve_steps
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.attention import check_attention
from dynrank_ds.training.model import (
    DTYPES,
    adapt,
    check_model_folder,
    model_without_weights,
    with_defaults,
)
from dynrank_ds.training.quantisation import check_quantisable, quantisation_config
from dynrank_ds.training.rundir import check_output
from dynrank_ds.training.samples import make_batches, prepare_data, split_held_out
from dynrank_ds.training.trackers import check_packages
from dynrank_ds.zero.config import check_processes, load_config

_LFS = b"version https://git-lfs"
_TIMES = ("interval", "t_i", "t_f")
"""Keys of methods' sections that are steps, the one to lower first before the others."""


@dataclass(frozen=True)
class CheckedRun:
    """A recipe that can be run, and what it comes to."""

    recipe: Recipe
    """With this machine's dtype."""
    dtype_reason: str
    samples: TokenisedDataset
    held_out: TokenisedDataset
    model: PreTrainedModel
    """On the meta device, with its adapter."""
    modules: dict[str, AdaptedModule]
    method: Method
    steps: int


def check_run(recipe: Recipe, n_processes: int) -> CheckedRun:
    """Check everything of a run of `n_processes` that needs neither them nor the model's weights.

    Raises:
        DynrankError: what cannot be run.
    """
    check_packages(recipe)
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    dtype, reason = dtypes.resolve_dtype(recipe.model.dtype, "cpu" if on_cpu else "cuda")
    recipe = recipe.with_dtype(dtype)
    config = load_config(recipe.deepspeed.config, recipe.triples_in_bf16)
    check_processes(config, recipe.deepspeed.config, n_processes)
    recipe.accumulation(n_processes)
    _check_eval(recipe)
    check_model_files(recipe.model.path)
    quantisation_config(recipe.model, DTYPES[recipe.model.dtype])  # which needs packages
    model = model_without_weights(recipe.model.path)
    check_quantisable(recipe.model, model)
    check_weight_files(recipe.model.path)
    check_attention(model.config, recipe.model.attention)
    recipe = with_defaults(recipe)
    samples, held_out = split_held_out(prepare_data(recipe)[0], recipe)
    _check_samples(samples, held_out, model, recipe)
    make_batches(samples, recipe)
    steps = recipe.total_steps(len(samples))
    check_steps(recipe, len(samples))
    modules = adapt(model, recipe)
    method = build_method(recipe.method, modules, steps, torch.device("meta"))
    return CheckedRun(recipe, reason, samples, held_out, model, modules, method, steps)


def check_before_meeting(recipe: Recipe, resume: bool) -> None:
    """Check a run in a process that has not met the others yet; what is logged meanwhile is logged again later.

    Raises:
        DynrankError: what cannot be run; every process of a machine finds the same.
    """
    run = Path(recipe.output.dir)
    check_output(run, resume)
    if resume and (complete_checkpoints(run, STEP) or complete_checkpoints(run, BEST)):
        # The checkpoint holds what the run started from: that adapter may be gone.
        recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init_from": None})})
    logging.disable(logging.WARNING)
    try:
        check_run(recipe, _expected_processes())
    finally:
        logging.disable(logging.NOTSET)


def _expected_processes() -> int:
    if "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def check_steps(recipe: Recipe, n_samples: int) -> None:
    """Refuse times of the method and the warm-up that the number of steps leaves no room for.

    Raises:
        RecipeError: with where the number comes from and a value that would be right.
    """
    steps, train = recipe.total_steps(n_samples), recipe.train
    origin = f"train.steps is {steps}"
    if train.steps is None:
        origin = (
            f"{steps} steps are train.epochs {train.epochs:g} of {n_samples:,} samples in global batches of "
            f"{train.global_batch_size}"
        )
    warmup = resolve_steps(train.warmup, steps, "train.warmup")
    if warmup > steps:
        raise RecipeError(
            f"train.warmup is {warmup} steps, longer than training ({origin}): lower it to at most {steps}"
        )
    try:
        recipe.method.adjustments(steps)
    except RecipeError as error:
        raise RecipeError(f"{error} ({origin}{_what_would_do(recipe, steps)})") from error


def _what_would_do(recipe: Recipe, steps: int) -> str:
    """Return the largest values of single times at which the method has adjustments, as the end of a sentence."""
    section = recipe.method
    found = []
    for key in _TIMES:
        low = int(key != "t_i" and key != "t_f")
        if key not in type(section).model_fields or not _fits(recipe, key, low, steps):
            continue
        present = resolve_steps(getattr(section, key), steps, f"method.{key}")
        high = min(present, steps)
        while (
            high - low > 1
        ):  # what fits is found by halving: a shorter time leaves room for as many adjustments
            middle = (low + high) // 2
            low, high = (middle, high) if _fits(recipe, key, middle, steps) else (low, middle)
        if low < present:
            found.append(f"method.{key} {low}")
    return f"; {' or '.join(found)} would do" if found else ""


def _fits(recipe: Recipe, key: str, value: int, steps: int) -> bool:
    try:
        recipe.method.model_copy(update={key: value}).adjustments(steps)
    except RecipeError:
        return False
    return True


def _check_samples(
    samples: TokenisedDataset, held_out: TokenisedDataset, model: PreTrainedModel, recipe: Recipe
) -> None:
    """Refuse samples that the model cannot read, or too few of them.

    Raises:
        DataError, ModelError: with the figures.
    """
    if len(samples) < recipe.train.global_batch_size:
        raise DataError(
            f"{len(samples)} samples are fewer than train.global_batch_size {recipe.train.global_batch_size}, so every "
            "step would hold some of them twice: give more rows, or a smaller global batch"
        )
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    n_embeddings = len(embedding)
    largest = int(samples.tokens.max())
    if largest >= n_embeddings:
        raise ModelError(
            f"model.path {recipe.model.path}: its tokenizer gives the token {largest}, but its embedding has "
            f"{n_embeddings} rows: give the tokenizer that belongs to the model, or resize the embedding"
        )
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(int(part.lengths.max()) for part in (samples, held_out) if len(part))
    if isinstance(n_positions, int) and longest > n_positions:
        raise RecipeError(
            f"data.max_length is {recipe.data.max_length} and the longest sample has {longest} tokens, but model.path "
            f"{recipe.model.path} has {n_positions} positions (max_position_embeddings): lower data.max_length to "
            f"{n_positions}"
        )


def _check_eval(recipe: Recipe) -> None:
    from dynrank_eval.tasks import TASKS, task_name

    unknown = [name for name in recipe.eval.tasks if task_name(name) not in TASKS]
    if unknown:
        raise RecipeError(f"eval.tasks names {unknown[0]!r}: known are {', '.join(TASKS)}")


def check_model_files(path: str) -> None:
    """Refuse a local model folder whose files are not what their names say; hub ids pass.

    Raises:
        ModelError: a file is a Git LFS pointer, or the model needs code of its own.
    """
    check_model_folder(path)
    folder = Path(path)
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS):
            raise ModelError(
                f"model.path {path}: {file.name} is a Git LFS pointer, not the file: run `git lfs pull` in its "
                "repository"
            )
    _check_code(folder, path)


def check_weight_files(path: str) -> None:
    """Refuse a local model folder whose weights are not safetensors, or not all there; hub ids pass.

    Raises:
        ModelError: naming what is there or lacks.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        pickled = [name for pattern in ("*.bin", "*.pt", "*.pth") for name in folder.glob(pattern)]
        if pickled:
            raise ModelError(
                f"model.path {path} holds its weights as {sorted(pickled)[0].name}, a pickle file, which is never "
                "read: convert it to safetensors (load it in transformers and call save_pretrained)"
            )
        raise ModelError(f"model.path {path} has no weights (*.safetensors)")
    _check_index(folder, path)


def _check_index(folder: Path, path: str) -> None:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.path {path}: {index.name} is no index of weights ({error})") from error
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"model.path {path} lacks {len(missing)} of its {len(named)} weight files, the first {missing[0]}: fetch "
            "the whole model"
        )


def _check_code(folder: Path, path: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ModelError(f"model.path {path}: config.json is no JSON ({error})") from error
    if isinstance(config, dict) and "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"model.path {path} is a {config.get('model_type')} model, which needs code of its own (auto_map in "
            "config.json) that transformers does not have: such code is never run here"
        )
