"""Bases read into ZeRO-3 shards against transformers' own loading: FOLDER, then names of its folders with a recipe."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dynrank_ds.recipe import Recipe, load_recipe
from dynrank_ds.training.model import DTYPES, adapt, load_model
from dynrank_ds.zero import processes
from dynrank_ds.zero.config import complete_config, load_config
from dynrank_ds.zero.partitioner import make_partitioner
from tests.support.watching import main, write
from tests.zero.workers.collectives import OF_A_GROUP, noting, reached


def loads(folder: Path) -> None:
    for name in sys.argv[2:]:
        recipe = load_recipe(str(folder / name / "recipe.yaml"))
        write(folder / name, "loaded", compared(recipe))


def configuration(recipe: Recipe) -> dict[str, Any]:
    bf16 = recipe.model.dtype == "bf16"
    return complete_config(load_config(recipe.deepspeed.config, bf16), 1, 1, 1.0, bf16)


def compared(recipe: Recipe) -> dict[str, Any]:
    """How it was loaded, how many collectives that took, and what differs from transformers' own loading."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dynrank_ds").addHandler(handler)
    logging.getLogger("dynrank_ds").setLevel(logging.INFO)
    config = configuration(recipe)
    reached.clear()
    with ExitStack() as patches:
        for method in OF_A_GROUP:
            noted = noting(method, getattr(dist.ProcessGroup, method))
            patches.enter_context(patch.object(dist.ProcessGroup, method, noted))
        model = load_model(recipe.model, False, make_partitioner(config, DTYPES[recipe.model.dtype]))
        base = {id(p) for p in model.parameters()}
        adapt(model, recipe)
        collectives = list(reached)
    saves_no_weights = torch.nn.functional.linear is zero3_linear_wrap
    partitioned = sum(hasattr(p, "ds_tensor") for p in model.parameters() if id(p) in base)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0),
        config=config,
    )
    own = AutoModelForCausalLM.from_pretrained(
        recipe.model.path,
        dtype=DTYPES[recipe.model.dtype],
        attn_implementation=model.config._attn_implementation,
    )
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        logits = engine(input_ids=tokens).logits
    result = {
        "said": [line for line in said if "base" in line or "loaded whole" in line],
        "collectives": collectives,
        "partitioned": partitioned,
        "saves no weights": saves_no_weights,
        "parameters": differing(own, model, "named_parameters", recipe),
        "buffers": differing(own, model, "named_buffers", recipe),
        "logits": bool(torch.equal(logits, own(input_ids=tokens).logits)),
        "finite": bool(logits.isfinite().all() and logits.std() > 0),
    }
    engine.destroy()
    processes.barrier()
    return result


def differing(own: nn.Module, model: nn.Module, kind: str, recipe: Recipe) -> list[str]:
    """Names of tensors of the unsharded model that are not bit for bit those of the sharded one."""
    ours = {name.replace(".base.", "."): t for name, t in getattr(model, kind)(remove_duplicate=False)}
    names = []
    for name, tensor in getattr(own, kind)(remove_duplicate=False):
        whole: Tensor = ours[name]
        with deepspeed.zero.GatheredParameters([whole] if isinstance(whole, nn.Parameter) else []):
            if whole.dtype != tensor.dtype or not torch.equal(whole, tensor):
                names.append(name)
    return names


if __name__ == "__main__":
    main([loads])
