"""Trains by a recipe, under `deepspeed`, `torchrun`, bare `srun`, or alone.

    deepspeed --num_gpus 8 launcher/train.py --recipe quickstart train.learning_rate=1e-3 resume=auto

Exit codes: 0 done; 75 stopped by a signal, saved as far as there was something to save; 2 a mistake in the recipe,
model, data or directory, or a full disk; 1 anything else, such as another process's end.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dynrank_ds.errors import DynrankError, MachineError, RecipeError
from dynrank_ds.files import DISK_FULL
from dynrank_ds.training.last_line import print_error
from dynrank_ds.training.signals import StopRequest, exit_code_when_stopped, note_signals

if TYPE_CHECKING:
    from dynrank_ds.recipe import Recipe

# What takes seconds to import is imported where it is used: signals are noted before, and a mistake in the recipe is
# printed before DeepSpeed loads.


def main(stop_request: StopRequest) -> int:
    parser = argparse.ArgumentParser(
        description="Train low-rank adapters whose ranks change, by a recipe.",
        epilog="example: deepspeed --num_gpus 8 launcher/train.py --recipe quickstart train.steps=200 resume=auto",
    )
    parser.add_argument(
        "--recipe", required=True, help="name of a shipped recipe, a YAML file, or parts MODEL+DATA+METHOD"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="section.key=value, or resume=auto|never")
    arguments = parser.parse_intermixed_args()
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    # A mistake that all processes see is printed once a node: another node's files may be at fault.
    first_here = first or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID")) == "0"
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(levelname)s %(message)s")
    for noisy in ("httpx", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # The node that waits for the others, or for its disk, says so itself.
    for local in ("dynrank_ds.zero.rendezvous", "dynrank_ds.shared_disk"):
        logging.getLogger(local).setLevel(logging.WARNING)
    try:
        resume, overrides = _split_resume(arguments.overrides)
        return _train(load_recipe(arguments.recipe, overrides), resume, stop_request)
    except DynrankError as error:
        # What a machine lacks, such as room on its disk, may be seen by one process alone.
        if first_here or isinstance(error, MachineError):
            print_error(error)
        return 2


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    from dynrank_ds import recipe

    return recipe.load_recipe(name, overrides)


def _train(recipe: Recipe, resume: bool, stop_request: StopRequest) -> int:
    from dynrank_ds.training.checks import check_before_meeting
    from dynrank_ds.training.run import train
    from dynrank_ds.training.state import RunState
    from dynrank_ds.zero import processes
    from dynrank_ds.zero.peer_failure import PeerFailureError, name_failed_peer

    check_before_meeting(recipe, resume)
    device = processes.start(recipe.deepspeed.timeout)
    state = RunState(Path(recipe.output.dir))
    try:
        with name_failed_peer(state.write_failure):
            done = train(recipe, resume, device, stop_request, state)
    except PeerFailureError as error:
        if error.should_report:
            print_error(f"{error}; resume with resume=auto")
        return 1
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise MachineError(
            f"{recipe.output.dir}: {error.strerror}; checkpoints are undamaged: free disk space, then resume with "
            "resume=auto"
        ) from error
    processes.stop()
    return 0 if done else exit_code_when_stopped()


def _split_resume(overrides: list[str]) -> tuple[bool, list[str]]:
    chosen = [o.removeprefix("resume=") for o in overrides if o.startswith("resume=")]
    for value in chosen:
        if value not in ("auto", "never"):
            raise RecipeError(f"resume is '{value}': give auto or never")
    return chosen[-1:] == ["auto"], [o for o in overrides if not o.startswith("resume=")]


if __name__ == "__main__":
    sys.exit(main(note_signals()))
