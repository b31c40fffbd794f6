"""PiSSA runs at their start and pruned right away: FOLDER, then the overrides of each run, joined by commas."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrank_ds.adapters.pissa import PissaLinear
from dynrank_ds.ranking.plan import RankPlan
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training import run
from dynrank_ds.training.loop import Trainer
from dynrank_ds.zero import processes
from tests.support.watching import main, write


def prunes(folder: Path) -> None:
    for overrides in sys.argv[2:]:
        output = folder / f"{overrides}-{processes.world_size()}"
        recipe = load_recipe(str(folder / "recipe.yaml"), [*overrides.split(","), f"output.dir={output}"])
        trainer = run.set_up(recipe, False, torch.device("cpu"))
        found = {"start": logits(trainer)}
        write(output, "shards", shards(trainer))
        prune(trainer)
        found["pruned"] = logits(trainer)
        write(output, "pruned-shards", shards(trainer))
        if "lora_E" in trainer.engine.layout.factors:
            trainer.engine.mask([(0,)] * len(trainer.engine.modules))
            found["masked"] = logits(trainer)
        if processes.rank() == 0:
            torch.save(found, output / "logits.pt")
        trainer.engine._close()
        processes.barrier()


def prune(trainer: Trainer) -> None:
    """Module 0 loses its first triple, 1 all but the last, 2 gets two more, 3 loses one and gets one."""
    everything = [tuple(range(rank)) for rank in trainer.engine.layout.ranks]
    keep, new = list(everything), [0] * len(everything)
    keep[0], keep[1], keep[3] = everything[0][1:], everything[1][-1:], everything[3][:2] + everything[3][3:]
    new[2], new[3] = 2, 1
    plan = RankPlan(tuple(keep), tuple(new))
    statistics = trainer.method.row_statistics
    statistics.update(trainer.engine.resize(plan, partial(trainer._new_rows, plan), statistics))


@torch.no_grad()
def logits(trainer: Trainer) -> Tensor:
    engine: Any = trainer.engine
    engine._engine.eval()
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    # Through the engine's own forward: its hooks gather what is partitioned.
    found: list[Tensor] = []
    head = engine._model.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: found.append(output.clone()))
    positions = torch.arange(24)
    engine._engine(input_ids=tokens, positions=positions, targets=tokens.flatten(), every_position=True)
    handle.remove()
    engine._engine.train()
    return found[0].view(2, 12, -1)


def shards(trainer: Trainer) -> dict[str, list[int]]:
    """Of every module: elements of initial_A and initial_B that this process holds, and that they have."""
    found = {}
    for shape, module in zip(trainer.engine.shapes, trainer.engine.modules, strict=True):
        assert isinstance(module, PissaLinear)
        params: list[Any] = [p for p in (module.initial_A, module.initial_B) if p is not None]
        held = sum(getattr(p, "ds_tensor", p).numel() for p in params)
        found[shape.name] = [held, sum(getattr(p, "ds_numel", p.numel()) for p in params)]
    return found


if __name__ == "__main__":
    main([prunes])
