"""What DeepSpeed gathers in training: python -m tests.planning.gathers_worker RECIPE OUTPUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.run import train
from dynrank_ds.zero import processes
from dynrank_ds.zero.engine import ZeroEngine

_UNITS = ("Embedding", "LlamaDecoderLayer", "LlamaRMSNorm", "ChunkedCrossEntropy")


def main() -> None:
    recipe = load_recipe(sys.argv[1])
    device = processes.start(recipe.deepspeed.timeout)
    parameters: list[Any] = []
    turns: list[tuple[str, bool, int]] = []
    fetch, build, call = (
        PartitionedParameterCoordinator.fetch_sub_module,
        ZeroEngine._build,
        ZeroEngine.__call__,
    )

    def watched_build(engine: Any, layout: Any) -> None:
        build(engine, layout)
        parameters[:] = engine._model.parameters()

    def watched_forward(engine: Any, **batch: Any) -> Any:
        turns.clear()  # the last micro-batch alone is looked at
        return call(engine, **batch)

    def watched_fetch(coordinator: Any, module: Any, forward: bool) -> None:
        fetch(coordinator, module, forward)
        if type(module).__name__ in _UNITS:
            held = (ZeroParamStatus.AVAILABLE, ZeroParamStatus.INFLIGHT)
            elements = sum(p.ds_numel for p in parameters if p.ds_status in held)
            turns.append((type(module).__name__, forward, elements))

    ZeroEngine._build, ZeroEngine.__call__ = watched_build, watched_forward  # type: ignore[method-assign]
    PartitionedParameterCoordinator.fetch_sub_module = watched_fetch
    train(recipe, False, device)
    Path(sys.argv[2], f"turns-{processes.rank()}.json").write_text(json.dumps(turns))
    processes.stop()


if __name__ == "__main__":
    main()
