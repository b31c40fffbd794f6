"""A training run whose memory is that of what it holds: python -m tests.planning.peak_worker RECIPE OUTPUT."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

# glibc would keep what is freed, twice as much as is held at any time; of 64 KiB or more it keeps nothing now.
M_MMAP_THRESHOLD = -3
ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 65536)

from dynrank_ds.bench.memory import peak_memory  # noqa: E402
from dynrank_ds.recipe import load_recipe  # noqa: E402
from dynrank_ds.training.run import train  # noqa: E402
from dynrank_ds.zero import processes  # noqa: E402


def main() -> None:
    recipe = load_recipe(sys.argv[1])
    device = processes.start(recipe.deepspeed.timeout)
    train(recipe, False, device)
    Path(sys.argv[2], f"peak-{processes.rank()}.json").write_text(json.dumps(peak_memory()))
    processes.stop()


if __name__ == "__main__":
    main()
