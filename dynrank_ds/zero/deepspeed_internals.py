"""What this package uses of DeepSpeed beyond its documented interface, each with the reason; seen in 0.19.8.

`check` finds out at start whether an installed DeepSpeed still has all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, z3_leaf_parameter
from torch import Tensor, nn

from dynrank_ds.errors import MachineError

SEEN_IN = "0.19.8"

_HOOKS_OF_MODULES = ("pre_bwd_fn", "post_bwd_fn")
"""Attributes that ZeRO-3 sets on every module once and then keeps: after a rebuild the first engine would go on
driving the fetches of backward, unseen by the new one, whose trace would end with forward and prefetch nothing more."""
_LINKS_OF_PARAMETERS = ("_z3_optimizer", "_zero_optimizer", "_hp_mapping")
"""Attributes of parameters that point to their optimizer, whose gradient hooks hold them from within autograd: a
reference cycle that no garbage collector sees, and that would keep the engine and the parameters it replaced alive."""
_CACHE = "_PartitionedParameterCoordinator__params_to_release"
"""A function wrapped in lru_cache with `self` in its key (and wrapped once more for a profiler): on the class, it keeps
the coordinator of every engine alive."""


def check() -> None:
    """Compare the installed DeepSpeed with what this module relies on.

    Raises:
        MachineError: something was moved, naming it and both versions.
    """
    for what, holds in _ASSUMPTIONS.items():
        if not holds():
            raise MachineError(
                f"DeepSpeed {deepspeed.__version__} has moved {what}, which dynrank_ds uses (seen in {SEEN_IN}): "
                f"install deepspeed=={SEEN_IN}, or adapt dynrank_ds/zero/deepspeed_internals.py"
            )


def _has_release_cache() -> bool:
    closure: Any = getattr(getattr(PartitionedParameterCoordinator, _CACHE, None), "__closure__", None)
    return bool(closure) and hasattr(closure[0].cell_contents, "cache_clear")


def _function(owner: type, name: str) -> Callable[..., Any] | None:
    return getattr(owner, name, None)


def _mentions(owner: Callable[..., Any] | None, *names: str) -> bool:
    source = inspect.getsource(owner) if owner is not None else ""
    return all(name in source for name in names)


def _module_hooks_are_set() -> bool:
    from deepspeed.runtime.zero import parameter_offload

    source = inspect.getsource(parameter_offload)
    return all(name in source for name in _HOOKS_OF_MODULES)


_ASSUMPTIONS: dict[str, Callable[[], bool]] = {
    "PartitionedParameterCoordinator.__params_to_release": _has_release_cache,
    "the hooks module_forward_pre_hook and module_forward_post_hook of the engine": lambda: _mentions(
        DeepSpeedEngine, "module_forward_pre_hook", "module_forward_post_hook"
    ),
    "the attributes pre_bwd_fn and post_bwd_fn of modules": _module_hooks_are_set,
    "fp32_partitioned_groups_flat and fp16_groups of the ZeRO-3 optimizer": lambda: _mentions(
        DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat", "fp16_groups"
    ),
    "single_partition_of_fp32_groups and averaged_gradients of the ZeRO-1 and 2 optimizer": lambda: _mentions(
        DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups", "averaged_gradients", "cpu_offload"
    ),
    "the trace of the parameter coordinator": lambda: all(
        hasattr(PartitionedParameterCoordinator, name)
        for name in ("is_complete_trace", "is_invalid_trace", "_invalidate_trace")
    ),
    "the gathers of create_reduce_and_remove_grad_hooks": lambda: _mentions(
        _function(DeepSpeedZeroOptimizer_Stage3, "create_reduce_and_remove_grad_hooks"),
        "param.all_gather()",
        "if not z3_leaf_parameter(param):",
    ),
    "the broadcasts of DeepSpeedEngine._broadcast_model and zero.Init._zero_init_param": lambda: all(
        _mentions(_function(owner, name), "broadcast(")
        for owner, name in ((DeepSpeedEngine, "_broadcast_model"), (Init, "_zero_init_param"))
    ),
    "what zero.Init makes and places shards by": lambda: (
        _mentions(
            Init, "_aligned_size", "_partition_rank", "remote_device", "ds_numel_aligned", "final_location"
        )
        and all(
            hasattr(Init, name) for name in ("_convert_to_deepspeed_param", "_enable_mem_efficient_linear")
        )
    ),
    "groups._WORLD_GROUP": lambda: hasattr(groups, "_WORLD_GROUP"),
    "ops.__compatible_ops__": lambda: hasattr(deepspeed.ops, "__compatible_ops__"),
}


def set_world_group(world_size: int, timeout: float) -> None:
    """Make the group of all processes now, with the run's timeout in seconds.

    DeepSpeed would make it when the model is loaded, with torch's half an hour as timeout: a process that failed
    meanwhile would keep the others waiting.
    """
    groups._WORLD_GROUP = dist.new_group(range(world_size), timedelta(seconds=timeout))


def disable_shared_memory_op() -> None:
    """Leave out an all-reduce for inference on CPU that training never calls.

    Building it takes a minute of g++, and a run that is killed meanwhile leaves a lock that every later run waits for.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero3_masters(optimizer: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield each flat fp32 master of this process, with the parameters whose shards it is made of, in order.

    DeepSpeed's documented safe_get_local_fp32_param copies what is offloaded to the GPU: no view to change.
    """
    yield from zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)


def zero2_master(optimizer: Any) -> Tensor:
    """Return the flat fp32 master of this process under ZeRO-1 and 2, which have one parameter group here."""
    master: Tensor = optimizer.single_partition_of_fp32_groups[0]
    return master


def zero2_gradients(optimizer: Any) -> Tensor:
    """Return the flat gradient of `zero2_master`, in a copy: DeepSpeed clips its own in place later."""
    if optimizer.cpu_offload:
        return zero2_master(optimizer).grad.clone()  # type: ignore[union-attr]
    return torch.cat([gradient.flatten() for gradient in optimizer.averaged_gradients[0]])


@contextmanager
def trace_of_training_kept(engine: Any) -> Iterator[None]:
    """Run a forward that is not part of a training step.

    ZeRO-3 would take the order of this forward for that of a whole step, and never prefetch again.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)  # of stage 3
    coordinator = offload.get_param_coordinator() if offload else None
    recording = coordinator is not None and not coordinator.is_complete_trace()
    yield
    if coordinator is not None and recording and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


@contextmanager
def without_needless_work() -> Iterator[None]:
    """Build ZeRO-3 engines without two things that DeepSpeed does to every parameter for nothing.

    It gathers each of a leaf module, by a collective of its own, to set a gradient hook, and then sets none: the module
    has one for all. And it formats all parameters of the model, for a message that it does not print.
    """
    original = DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks

    def create(optimizer: Any) -> None:
        params = [param for group in optimizer.fp16_groups for param in group if z3_leaf_parameter(param)]
        gathers = [param.all_gather for param in params]
        for param in params:
            param.all_gather = lambda: None
        original(optimizer)
        for param, gather in zip(params, gathers, strict=True):
            param.all_gather = gather

    with (
        _replaced(DeepSpeedZeroOptimizer_Stage3, "create_reduce_and_remove_grad_hooks", create),
        _replaced(nn.Parameter, "__repr__", object.__repr__),
    ):
        yield


@contextmanager
def nothing_broadcast() -> Iterator[None]:
    """Build engines of a model whose parameters are the same on every process, as they are at a rank change.

    DeepSpeed sends those of the first process to all: under ZeRO-1 and 2 the whole model, base included, under ZeRO-3
    each new parameter, by a collective of its own.
    """

    def partition(init: Any, param: Any) -> None:
        init._convert_to_deepspeed_param(param)
        param.partition()

    with (
        _replaced(DeepSpeedEngine, "_broadcast_model", lambda engine: None),
        _replaced(Init, "_zero_init_param", partition),
    ):
        yield


@contextmanager
def _replaced(owner: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def release_engine(engine: Any, model: nn.Module) -> None:
    """Destroy an engine, and remove what would keep it alive or act on the next one."""
    engine.destroy()
    # `destroy` leaves these two on the module at every rebuild.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for module in model.modules():
        for name in _HOOKS_OF_MODULES:
            module.__dict__.pop(name, None)
    for param in model.parameters():
        for name in _LINKS_OF_PARAMETERS:
            param.__dict__.pop(name, None)
    getattr(PartitionedParameterCoordinator, _CACHE).__closure__[0].cell_contents.cache_clear()


def release_parameter(param: nn.Parameter) -> None:
    """Remove DeepSpeed's functions from a replaced parameter.

    They refer to it: a cycle, which would keep its engine's 16-bit weights alive too.
    """
    param.__dict__.clear()
