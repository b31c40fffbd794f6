"""PEFT adapter folders in two formats, written module by module from whatever holds triples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch

from dynrank_ds.checkpoint.adapter import LinearShape
from dynrank_ds.errors import RunError
from dynrank_ds.export.peft_adapter import PeftAdapter, factor_key, magnitude_key
from dynrank_ds.export.peft_config import CONFIG, WEIGHTS
from dynrank_ds.tensorfile import TensorEntry, TensorFileWriter

Format = Literal["peft", "padded"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AdapterSource(Protocol):
    """An adapter whose triples are read one linear layer at a time."""

    @property
    def description(self) -> str:
        """What it is called in messages."""

    @property
    def base_model(self) -> str | None:
        """Folder or hub id of its base."""

    @property
    def linears(self) -> Mapping[str, LinearShape]:
        """The shape of every adapted linear layer by its full name, those of rank 0 too."""

    def triples(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (r, in) and B (r, out) of a linear layer of rank r > 0, in fp32: dW is scale * B^T A."""

    @property
    def weight_decomposed(self) -> bool:
        """Whether linear layers have magnitudes."""

    def magnitudes(self, name: str) -> torch.Tensor | None:
        """Return the magnitudes of a linear layer's output rows, (out,) fp32; None where it has none."""


def refuse_format(source: AdapterSource, format: Format) -> None:
    """Refuse what no engine would read rightly.

    Raises:
        RunError: it is to be padded, and weight-decomposed.
    """
    if format == "padded" and source.weight_decomposed:
        raise RunError(
            f"{source.description} is weight-decomposed: the engines that --format padded is for serve no magnitudes; "
            "export with --format peft and merge it"
        )


def write_adapter(source: AdapterSource, folder: Path, format: Format, dtype: torch.dtype) -> None:
    """Write the two files of a PEFT adapter, and read back every tensor.

    Args:
        source: the triples.
        folder: where to.
        format: `peft`, every module at its own rank and none of rank 0; or `padded`, one rank for all.
        dtype: of the stored factors.

    Raises:
        RunError: the adapter changes nothing, or a value is beyond the range of `dtype`.
    """
    refuse_format(source, format)
    if all(linear.rank == 0 for linear in source.linears.values()) and not source.weight_decomposed:
        raise RunError(f"Every module of {source.description} has rank 0: the adapter changes nothing")
    _WRITERS[format](source, folder, dtype)
    _read_back(folder)


def _write_peft(source: AdapterSource, folder: Path, dtype: torch.dtype) -> None:
    """Write PEFT files in which every module keeps its own rank and modules of rank 0 are left out.

    Where weights are decomposed a module of rank 0 has magnitudes yet, and gets one triple of zeros, which PEFT needs.
    Where heads are modules a module's rank is the sum of theirs: PEFT knows no module structure.

    e is folded into B; the scale is PEFT's alpha / r. Patterns list every module by its full name: PEFT and
    vLLM take the first key that matches a module's name or a dotted suffix of it, so longer names come first.
    """
    least = int(source.weight_decomposed)
    ranks = {n: max(least, linear.rank) for n, linear in source.linears.items() if linear.rank or least}
    names = sorted(ranks, key=lambda name: (-len(name), name))
    alphas = {name: _plain(source.linears[name].scale * ranks[name]) for name in names}
    largest = max(names, key=lambda name: ranks[name])
    uniform = len({(ranks[name], alphas[name]) for name in names}) == 1
    config = _config(source, list(ranks), ranks[largest], alphas[largest])
    config["use_dora"] = source.weight_decomposed
    if not uniform:
        config |= {"rank_pattern": {name: ranks[name] for name in names}, "alpha_pattern": alphas}
    _write(folder, config, source, ranks, ((name, *_triples(source, name)) for name in ranks), dtype)


def _write_padded(source: AdapterSource, folder: Path, dtype: torch.dtype) -> None:
    """Write PEFT files with one rank for all modules: the largest, padded with zero rows.

    Modules of rank 0 are zeros. The scale is folded into B, so that alpha = r: right also on engines that
    ignore `rank_pattern`.
    """
    rank = max(linear.rank for linear in source.linears.values())
    config = _config(source, list(source.linears), rank, rank)
    ranks = dict.fromkeys(source.linears, rank)
    _write(folder, config, source, ranks, _padded_triples(source, rank), dtype)


_WRITERS: dict[str, Callable[[AdapterSource, Path, torch.dtype], None]] = {
    "peft": _write_peft,
    "padded": _write_padded,
}


def _triples(source: AdapterSource, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the triples of a linear layer, one of zeros where it has none."""
    linear = source.linears[name]
    if linear.rank:
        return source.triples(name)
    return torch.zeros(1, linear.in_features), torch.zeros(1, linear.out_features)


def _padded_triples(source: AdapterSource, rank: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name, linear in source.linears.items():
        a, b = torch.zeros(rank, linear.in_features), torch.zeros(rank, linear.out_features)
        if linear.rank > 0:
            a[: linear.rank], b[: linear.rank] = source.triples(name)
            b *= linear.scale
        yield name, a, b


def _config(source: AdapterSource, targets: list[str], rank: int, alpha: float) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _plain(alpha: float) -> float:
    """Return whole numbers as integers, as PEFT expects of alpha."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _write(
    folder: Path,
    config: dict[str, object],
    source: AdapterSource,
    ranks: Mapping[str, int],
    triples: Iterator[tuple[str, torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    entries = []
    for name, rank in ranks.items():
        linear = source.linears[name]
        entries.append(TensorEntry(factor_key(name, "A"), dtype, (rank, linear.in_features)))
        entries.append(TensorEntry(factor_key(name, "B"), dtype, (linear.out_features, rank)))
        if source.weight_decomposed:
            # Always in fp32: what rounds a magnitude rounds a whole row of W.
            entries.append(TensorEntry(magnitude_key(name), torch.float32, (linear.out_features,)))
    changes = source.weight_decomposed
    with TensorFileWriter(folder / WEIGHTS, entries) as file:
        for name, a, b in triples:
            for side, factor in (("A", a), ("B", b.T)):
                stored = factor.to(dtype)
                if not torch.isfinite(stored).all():
                    raise RunError(
                        f"lora_{side} of {name} has values beyond the range of {dtype}: take another --dtype"
                    )
                file.write(factor_key(name, side), stored)
            magnitudes = source.magnitudes(name)
            if magnitudes is not None:
                file.write(magnitude_key(name), magnitudes)
            changes = changes or bool(a.any() and b.any())
    if not changes:
        raise RunError(
            f"Every lora_B of {source.description} is zero: the adapter changes nothing; train for more steps"
        )


def _read_back(folder: Path) -> None:
    """Read every tensor as any reader of the folder will; raises what is wrong with it."""
    with PeftAdapter(folder) as adapter:
        for name in adapter.modules:
            adapter.update(name)
            if adapter.weight_decomposed:
                adapter.magnitudes(name)
