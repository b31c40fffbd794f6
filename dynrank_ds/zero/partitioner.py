"""Parameters of the base that exist on each process as its ZeRO-3 shard alone, for the loader to fill.

DeepSpeed makes shards out of whole parameters: each is read, sent to all processes by the first, and cut. Here a shard
is allocated as DeepSpeed would have allocated it, and whoever loads the model fills it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param
from deepspeed.utils import groups
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def make_partitioner(config: dict[str, Any], dtype: torch.dtype) -> Partitioner | None:
    """Return a partitioner where ZeRO-3 partitions the base; None for stages 1 and 2, where each process has it whole.

    What only DeepSpeed's own partitioning of whole parameters can do gives None too, and is logged.
    """
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        return None
    if reason := _needs_whole_base(zero):
        logger.warning(
            "the base is loaded whole by every process: the DeepSpeed configuration has %s", reason
        )
        return None
    return Partitioner(config, dtype)


def _needs_whole_base(zero: Mapping[str, Any]) -> str | None:
    if zero.get("zero_quantized_nontrainable_weights"):
        return "zero_quantized_nontrainable_weights"
    if zero.get("mics_shard_size", -1) > 0:
        return "mics_shard_size"
    if (zero.get("offload_param") or {}).get("device") == OffloadDeviceEnum.nvme:
        return "offload_param to nvme"
    return None


@dataclass(frozen=True)
class LocalShard:
    """This process's part of a partitioned parameter."""

    data: Tensor
    """(n,), where it lies for good; to be filled."""
    start: int
    """Its first element in the flat parameter."""


class Partitioner:
    """The rules by which a run's ZeRO-3 configuration cuts and places parameters.

    Args:
        config: the whole configuration of the run.
        dtype: of the model.
    """

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        # A context that is never entered. Partitioned parameters keep it, and DeepSpeed gathers by it.
        self._init: Any = deepspeed.zero.Init(
            config_dict_or_path=config,
            dtype=dtype,
            # It would make the group, and refuse where an earlier run of the process has made it.
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
        )
        if self._init.mem_efficient_linear:
            # `Init(module)` does so, `Init()` does not, and autograd would keep every gathered weight until backward.
            self._init._enable_mem_efficient_linear()
        self.device: torch.device = self._init.local_device
        """Where parameters are gathered and buffers are used."""
        self.shard_bytes = 0
        """Of all shards made so far on this process, padding included."""

    def parameter(self, shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
        """Return a frozen parameter of this shape that occupies one element: to be given to `partition`."""
        whole = torch.empty((), dtype=dtype, device=self.device).expand(tuple(shape))
        return nn.Parameter(whole, requires_grad=False)

    def partition(self, param: nn.Parameter) -> LocalShard:
        """Turn a parameter of `parameter` into a partitioned one; no process communicates."""
        made: Any = param  # DeepSpeed hangs its own attributes on parameters: no type knows them
        self._init._convert_to_deepspeed_param(made)
        aligned = self._init._aligned_size(made)
        size = aligned // self._init._partition_world_size(made)
        start = min(self._init._partition_rank(made) * size, made.ds_numel)
        device = self.device if made.ds_persist else torch.device(self._init.remote_device)
        shard: Any = torch.empty(size, dtype=param.dtype, device=device)
        if device.type == "cpu" and self._init.pin_memory:
            shard = get_accelerator().pin_memory(shard)
        held = min(size, made.ds_numel - start)
        shard[held:] = 0  # padding, which the last processes may have
        shard.ds_numel, shard.status, shard.final_location = size, PartitionedParamStatus.AVAILABLE, None
        made.ds_tensor, made.ds_numel_aligned = shard, aligned
        free_param(made)
        self.shard_bytes += size * param.dtype.itemsize
        return LocalShard(shard[:held], start)

    def partitioned(self, whole: Tensor) -> nn.Parameter:
        """Return a frozen parameter whose shard holds this process's part of a tensor that every process has."""
        param = self.parameter(whole.shape, whole.dtype)
        shard = self.partition(param)
        shard.data.copy_(whole.reshape(-1)[shard.start : shard.start + len(shard.data)])
        return param


def is_partitioned(param: Tensor) -> bool:
    """Return whether this process holds a shard of a parameter alone."""
    return hasattr(param, "ds_tensor")


def whole_copies(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies of parameters, partitioned or not, on every process; every process must call it."""
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}
