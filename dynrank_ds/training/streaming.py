"""The base read from its files straight into ZeRO-3 shards, tensor by tensor.

ZeRO-3 cuts a parameter flat, so that a shard is one contiguous range of bytes of a safetensors file. Each process reads
its own ranges: none holds the model or a whole weight, nothing is sent, and on a node every byte is read once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from dynrank_ds.base_weights import BaseWeights, has_weight_files, loaded_names
from dynrank_ds.errors import ModelError
from dynrank_ds.quantised_layers import replace_linears
from dynrank_ds.training.architecture import auto_class
from dynrank_ds.training.quantisation import constant_bytes
from dynrank_ds.zero.partitioner import Partitioner

if TYPE_CHECKING:
    from dynrank_ds.zero.nf4 import Nf4Quantiser

logger = logging.getLogger(__name__)


class NotStreamableError(Exception):
    """A model that only transformers' own loading can load, with the reason."""


@dataclass
class _Plan:
    """Which stored tensor each tensor of the model is read from."""

    parameters: dict[str, list[str]] = field(default_factory=dict)
    """Stored name -> all names in the model of the parameter that it fills; several where it is tied."""
    buffers: dict[str, str] = field(default_factory=dict)
    """Name in the model -> stored name, of persistent buffers."""


def load_streamed(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str,
    partitioner: Partitioner,
    quantisation: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Return the base with every parameter partitioned, this process's shards filled, and every buffer whole.

    quantisation: of the layers that transformers quantises, each process doing its own blocks; by default of none.

    Raises:
        ModelError: weights are missing or of another shape; nothing is allocated then.
        NotStreamableError: transformers changes tensors of this model while loading it; nothing is allocated then.
    """
    if not has_weight_files(folder):
        raise NotStreamableError("its weights are not in safetensors files")
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()  # one object under both names: ZeRO must see one parameter, and it is read once
    with BaseWeights(folder) as weights:
        plan = _plan(model, weights, folder, dtype)
        quantiser = _quantiser(model, quantisation, partitioner) if quantisation else None
        _fill_buffers(model, plan, weights, partitioner.device)
        _fill_parameters(model, plan, weights, partitioner, quantiser)
    logger.info(
        "the base is read into ZeRO-3 shards: %.3f GiB on this process%s",
        partitioner.shard_bytes / 2**30,
        f", and {constant_bytes(model) / 2**30:.3f} GiB of quantisation constants" if quantiser else "",
    )
    return model


def _plan(model: PreTrainedModel, weights: BaseWeights, folder: Path, dtype: torch.dtype) -> _Plan:
    stored_names = _stored_names(model, weights)
    wanted = model.state_dict(keep_vars=True)
    if other := [name for name, param in model.named_parameters() if param.dtype != dtype]:
        raise NotStreamableError(f"{other[0]} is not {dtype}, and ZeRO-3 takes shards of one dtype")
    names_of: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        names_of.setdefault(id(tensor), []).append(name)
    plan, missing = _Plan(), []
    for names in names_of.values():
        there = [name for name in names if name in stored_names]
        if len(there) > 1:
            raise NotStreamableError(f"{there[0]} and {there[1]} are tied and both stored")
        if not there:
            missing.append(names[0])
            continue
        stored, tensor = stored_names[there[0]], wanted[there[0]]
        _check(stored, weights, tensor, folder)
        if isinstance(tensor, nn.Parameter):
            plan.parameters[stored] = names
        else:
            plan.buffers[names[0]] = stored
    _refuse_missing(model, missing, folder)
    _name_unused(model, [stored for name, stored in stored_names.items() if name not in wanted], folder)
    return plan


def _stored_names(model: PreTrainedModel, weights: BaseWeights) -> dict[str, str]:
    """Return {name in the model: stored name}."""
    found: dict[str, str] = {}
    for stored, loaded in loaded_names(model, list(weights.entries)).items():
        if loaded.converted:
            raise NotStreamableError(f"{stored} is converted on loading")
        if loaded.name in found:
            raise NotStreamableError(f"{found[loaded.name]} and {stored} are both loaded as {loaded.name}")
        found[loaded.name] = stored
    return found


def _check(stored: str, weights: BaseWeights, tensor: Tensor, folder: Path) -> None:
    entry = weights.entries[stored]
    if entry.shape != tuple(tensor.shape):
        raise ModelError(
            f"model.path {folder} holds {stored} of shape {entry.shape}, but by its config.json it is "
            f"{tuple(tensor.shape)}: give weights and configuration of one model"
        )
    if entry.dtype.itemsize == 1 or entry.dtype.is_floating_point != tensor.is_floating_point():
        raise NotStreamableError(f"{stored} is stored as {entry.dtype}")


def _refuse_missing(model: PreTrainedModel, missing: list[str], folder: Path) -> None:
    ignored = _pattern(model._keys_to_ignore_on_load_missing or ())
    refused = sorted(name for name in missing if not (ignored and ignored.search(name)))
    if refused:
        raise ModelError(
            f"model.path {folder} lacks {len(refused)} weights, the first {refused[0]}: give a whole model"
        )
    if missing:
        raise NotStreamableError(f"{missing[0]} is not stored, and made on loading")


def _name_unused(model: PreTrainedModel, unused: list[str], folder: Path) -> None:
    # What old checkpoints hold, and the model makes itself, as transformers has it.
    computed = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    expected = _pattern([*(model._keys_to_ignore_on_load_unexpected or ()), *computed])
    named = sorted(name for name in unused if not (expected and expected.search(name)))
    if named:
        logger.warning(
            "model.path %s holds %d tensors that its config.json has no place for, the first %s: they are not used",
            folder,
            len(named),
            named[0],
        )


def _pattern(patterns: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = "|".join(f"({pattern})" for pattern in patterns)
    return re.compile(alternatives) if alternatives else None


def _fill_buffers(model: PreTrainedModel, plan: _Plan, weights: BaseWeights, device: torch.device) -> None:
    """Read what is stored, whole on every process; transformers' own initialisation computes the rest."""
    kept_in_fp32 = _pattern(
        name.replace("*", ".*")
        for name in model._get_dtype_plan(model.dtype)  # as transformers matches them
    )
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    computed = []
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        parent, _, last = name.rpartition(".")
        dtype = buffer.dtype
        if name in plan.buffers and dtype.is_floating_point and kept_in_fp32 and kept_in_fp32.search(name):
            dtype = torch.float32
        made = torch.empty(buffer.shape, dtype=dtype, device=device)
        model.get_submodule(parent)._buffers[last] = made
        if name in plan.buffers:
            weights.read_into(plan.buffers[name], 0, made.view(-1))
            made._is_hf_initialized = True  # type: ignore[attr-defined]
        else:
            computed.append(name)
            if dtype.is_floating_point:
                made.fill_(torch.nan)
    model.initialize_weights()
    if unfilled := [name for name in computed if model.get_buffer(name).isnan().any()]:
        raise NotStreamableError(f"{unfilled[0]} is neither stored nor made by transformers' initialisation")


def _quantiser(
    model: PreTrainedModel, quantisation: BitsAndBytesConfig, partitioner: Partitioner
) -> Nf4Quantiser:
    """Return what quantises the layers that transformers would, which are replaced in `model`."""
    from dynrank_ds.zero.nf4 import BLOCK, Nf4Quantiser  # bitsandbytes is not needed otherwise

    linears = {f"{name}.weight": linear for name, linear in replace_linears(model, quantisation).items()}
    for name, linear in linears.items():
        if linear.in_features * linear.out_features % BLOCK:
            raise NotStreamableError(
                f"{name} has {linear.out_features} x {linear.in_features} weights, no multiple of NF4's {BLOCK}"
            )
    return Nf4Quantiser(linears, model.dtype, quantisation.bnb_4bit_use_double_quant, partitioner)


def _fill_parameters(
    model: PreTrainedModel,
    plan: _Plan,
    weights: BaseWeights,
    partitioner: Partitioner,
    quantiser: Nf4Quantiser | None,
) -> None:
    quantised = quantiser.linears if quantiser else {}
    # All shards first: temporary memory of the reading would leave gaps between them.
    dtype = model.dtype
    shards = []
    for stored, names in plan.parameters.items():
        if quantiser and names[0] in quantised:
            param = quantiser.parameter(names[0])
        else:
            param = partitioner.parameter(weights.entries[stored].shape, dtype)
        shards.append(partitioner.partition(param))
        for name in names:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._parameters[last] = param
    for (stored, names), shard in zip(plan.parameters.items(), shards, strict=True):
        if quantiser and names[0] in quantised:
            quantiser.fill(names[0], shard, partial(weights.read_into, stored))
        else:
            weights.read_into(stored, shard.start, shard.data)
