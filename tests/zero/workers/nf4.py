"""A base in NF4 under ZeRO: loss and gradients of FOLDER's recipes, all processes computing the same micro-batch."""

from __future__ import annotations

import gc
import sys
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.nn import Params4bit
from transformers import PreTrainedModel

from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.training.adamw import RowAgedAdamW
from dynrank_ds.training.architecture import decoder_layers
from dynrank_ds.training.loss import SummedLoss
from dynrank_ds.training.model import DTYPES, adapt, load_model
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine
from dynrank_ds.zero.partitioner import make_partitioner
from tests.support.nf4 import batch, drawn_factors
from tests.support.watching import main, write
from tests.zero.workers.loading import configuration


def steps(folder: Path) -> None:
    for name in sys.argv[2:]:
        recipe = load_recipe(str(folder / name / "recipe.yaml"))
        step(recipe, folder / name)


def step(recipe: Recipe, folder: Path) -> None:
    config = configuration(recipe)
    partitioner = make_partitioner(config, DTYPES[recipe.model.dtype])
    checkpointing = recipe.train.activation_checkpointing
    model = load_model(recipe.model, checkpointing, partitioner, torch.device("cpu"))
    whole_weights = [name for name, p in model.named_parameters() if not hasattr(p, "ds_tensor")]
    factors = drawn_factors(model, recipe)
    modules = adapt(model, recipe, factors.items())
    engine = ZeroEngine(
        SummedLoss(model),
        modules,
        ("lora_A", "lora_B"),
        config,
        partial(RowAgedAdamW, lr=0.0),
        {"lora_A": 1.0, "lora_B": 1.0},
        type(decoder_layers(model)[0]),
    )
    evaluated = engine.evaluate(**batch())  # which on some CPUs would rearrange the weights for good
    loss = engine(**batch())
    write(folder, "kept", kept_gathered(model))
    engine.backward(loss)
    gradients = engine.layout.split(engine.gradients())
    pieces = {
        f"{engine.shapes[f.module].name}.{f.factor}": (f.start, gradient.clone())
        for f, gradient in zip(engine.layout.fragments, gradients, strict=True)
    }
    rank = processes.rank()
    torch.save(
        {"loss": loss.detach(), "evaluated": evaluated, "gradients": pieces}, folder / f"step-{rank}.pt"
    )
    write(folder, "whole", whole_weights)
    engine._close()


def kept_gathered(model: PreTrainedModel) -> int:
    """How many packed weights somebody holds whole, such as autograd until backward."""
    shapes = {getattr(p, "ds_shape", p.shape) for p in model.parameters() if isinstance(p, Params4bit)}
    tensors = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]  # no proxies
    return sum(held.dim() == 2 and held.shape in shapes for held in tensors)


if __name__ == "__main__":
    main([steps])
