"""The processes of a run and the few collectives that are ours."""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Iterator
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_log_level_from_string
from torch import Tensor

from dynrank_ds.errors import MachineError
from dynrank_ds.zero import deepspeed_internals, rendezvous


def start(timeout: float = 600) -> torch.device:
    """Join the process group, started by `deepspeed`, `torchrun`, bare `srun` or alone.

    timeout: seconds for which a collective waits for a process.

    Returns this process's device.

    Raises:
        MachineError: under srun, the address of the first node is not set; it does not resolve; the port is in use; not
            all processes came in time; or the installed DeepSpeed lacks what this package uses of it.
    """
    rendezvous.set_variables()
    # DeepSpeed calls collectives by names that torch has renamed: a warning per call, per process.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its warnings and notes, such as the one of an "untested optimizer" at every rebuild, break the progress bar.
    set_log_level_from_string("error")
    deepspeed_internals.check()
    deepspeed_internals.disable_shared_memory_op()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # Under srun a process may be shown its own device alone.
        accelerator.set_device(int(os.environ["LOCAL_RANK"]) % accelerator.device_count())
    backend = accelerator.communication_backend_name()
    rendezvous.wait_for_name(min(timeout, rendezvous.RESOLVE_SECONDS))
    try:
        with rendezvous.watched(timeout):
            deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout), verbose=False)
            deepspeed_internals.set_world_group(world_size(), timeout)
    except dist.DistError as error:
        raise MachineError(rendezvous.failure(error, timeout)) from error
    return torch.device(accelerator.current_device_name())


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's rank in the group of all processes."""
    return dist.get_rank()


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes in place; one collective."""
    dist.all_reduce(tensor)
    return tensor


def gather_flat(tensor: Tensor) -> Tensor:
    """Gather (n,), with the same n on every process, to (world_size, n) on every process; one collective."""
    out = tensor.new_empty(world_size() * tensor.numel())
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out.view(world_size(), -1)


def from_each_process(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor of every process, of one shape everywhere, one after another; a broadcast each."""
    for process in range(world_size()):
        sent = tensor.clone() if process == rank() else torch.empty_like(tensor)
        dist.broadcast(sent, process)
        yield sent


def broadcast(tensor: Tensor, process: int) -> Tensor:
    """Give every process the tensor of one of them, of this shape everywhere, in place; one collective."""
    dist.broadcast(tensor, process)
    return tensor


def agree(digest: str, device: torch.device) -> bool:
    """Return whether all processes hold the same hexadecimal digest, of which the first 15 digits are compared."""
    own = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device=device)
    return len(set(gather_flat(own).flatten().tolist())) == 1


def barrier() -> None:
    """Wait for all processes."""
    dist.barrier()


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: of its accelerator, or on CPU resident."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return accelerator.max_memory_allocated() / 2**30
