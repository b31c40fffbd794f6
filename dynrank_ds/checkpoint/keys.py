"""Names and shapes of the tensors in a checkpoint's `state.safetensors`."""

from __future__ import annotations

from dynrank_ds.ranking.layout import ModuleShape

MASTER = "master"
"""The state that holds the fp32 weights; the others are the moments and the statistics of each element."""
PARTIAL, CONSTANT, REPLICATED = "statistics", "constant", "replicated"
"""What precedes the other tensors' names."""


def factor_key(state: str, module: str, factor: str) -> str:
    """Return the name of one state of one factor or vector, such as `master/model.layers.0.self_attn.q_proj.lora_A`."""
    return f"{state}/{module}.{factor}"


def vector_shape(vector: str, shape: ModuleShape) -> tuple[int, ...]:
    """Return the shape of every state of what a module trains beside its triples."""
    return (shape.vector_length(vector),)


def factor_shape(factor: str, rank: int, shape: ModuleShape) -> tuple[int, ...]:
    """Return the shape of every state of a factor at this rank."""
    return (rank,) if factor == "lora_E" else (rank, shape.row_length(factor))


def partial_key(statistic: str, process: int | str) -> str:
    """Return the name of one process's part of a statistic that is a sum over processes."""
    return f"{PARTIAL}/{statistic}/{process}"


def constant_key(name: str, module: str) -> str:
    """Return the name of what follows from the base alone and is kept for export, such as ||W_i||."""
    return f"{CONSTANT}/{module}.{name}"


def replicated_key(name: str) -> str:
    """Return the name of a tensor that all processes hold alike, such as a gate."""
    return f"{REPLICATED}/{name}"
