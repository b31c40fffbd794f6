"""What a PEFT LoRA adapter holds, and whether it is sound."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dynrank_ds.export.base_model import BaseModel, find_base, model_hash, stored_modules
from dynrank_ds.export.folder import read_record
from dynrank_ds.export.low_rank import effective_rank, singular_values
from dynrank_ds.export.peft_adapter import (
    Update,
    factor_key,
    module_of,
    module_of_magnitude,
    open_weights,
)
from dynrank_ds.export.peft_config import CONFIG, AdapterConfig, read_config
from dynrank_ds.tensorfile import TensorEntry, TensorFileReader

# What PEFT's LoRA stores beside lora_A and lora_B of linear layers; whole embeddings where they are adapted.
_OTHER_FACTOR = re.compile(
    r".*\.(lora_embedding_[AB]|lora_magnitude_vector(\.weight)?|lora_[AB]\.bias|base_layer\.weight"
    r"|embed_tokens\.weight|lm_head\.weight)"
)
_ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class ModuleReport:
    """One adapted linear layer."""

    name: str
    rank: int
    shape: tuple[int, int]
    """(out, in)."""
    scale: float
    norm: float
    """Frobenius norm of s B A; NaN where a factor is not finite."""
    effective_rank: float


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        modules: every module that has both factors, in the order of the file.
        other_tensors: names of tensors that belong to PEFT's LoRA but not to a linear layer's update.
        base: one line on the base and its hash.
        defects: one sentence each.
    """

    modules: list[ModuleReport]
    other_tensors: list[str]
    base: str
    defects: list[str]

    @property
    def parameters(self) -> int:
        """Elements of all lora_A and lora_B."""
        return sum(m.rank * sum(m.shape) for m in self.modules)

    def text(self) -> str:
        """Return the whole finding as text for a terminal."""
        scales = sorted({module.scale for module in self.modules})
        lines = [
            f"modules     {len(self.modules)} linear layers, total rank {sum(m.rank for m in self.modules)}, "
            f"{self.parameters:,} parameters",
            f"scale       {_number(scales[0])}" + (f" to {_number(scales[-1])}" if len(scales) > 1 else "")
            if scales
            else "scale       none",
            f"base        {self.base}",
        ]
        if self.other_tensors:
            lines.append(f"also holds  {len(self.other_tensors)} tensors such as {self.other_tensors[0]}")
        lines += ["", "ranks by layer", *_rank_table(self.modules), "", *_module_table(self.modules), ""]
        lines += [f"defect: {defect}" for defect in self.defects] or ["no defects"]
        return "\n".join(lines)


def inspect_adapter(adapter: Path, base: str | None = None) -> Inspection:
    """Read every tensor of a LoRA adapter, one module at a time, and return what it holds and what is wrong with it.

    Args:
        adapter: folder of a PEFT LoRA adapter; of DoRA's the magnitudes are checked too, others' additional tensors are
            counted.
        base: folder or hub id of a model to compare it with; None compares with none.

    Raises:
        RunError, TensorFileError: it is no LoRA adapter, or its files are damaged.
        ModelError: there is no such base.
    """
    config = read_config(adapter)
    model = find_base(base) if base is not None else None
    with open_weights(adapter) as file:
        modules, other, defects = _sort_tensors(file, config)
        reports = [_report(file, config, module, defects) for module in modules]
        if config.weight_decomposed:
            defects += _magnitude_defects(file, {report.name: report.shape[0] for report in reports})
    if not modules:
        defects.append("it has no module with both lora_A and lora_B")
    elif all(report.norm == 0 for report in reports) and not config.weight_decomposed:
        defects.append("every lora_B or lora_A is zero: the adapter changes nothing")
    others = {_plain_key(key).rsplit(".lora_", 1)[0] for key in other}
    defects += _unmatched_targets(config, [*modules, *others])
    line = f"{config.base_model or 'not named'}, not compared: name it with --base"
    if model is not None:
        defects += _compare_modules(config, {m.name: m.shape for m in reports}, others, model)
        line = _compare_hash(adapter, model, defects)
    return Inspection(reports, other, line, defects)


def _sort_tensors(file: TensorFileReader, config: AdapterConfig) -> tuple[list[str], list[str], list[str]]:
    """Modules with both factors of fitting shape, names of other tensors of PEFT's, and defects."""
    modules: dict[str, None] = {}
    other, defects = [], []
    for key, entry in file.entries.items():
        module = module_of(key)
        if module is not None and _ADAPTER_NAME.search(key) is None:
            modules[module] = None
            if len(entry.shape) != 2 or 0 in entry.shape or not entry.dtype.is_floating_point:
                defects.append(
                    f"{key} is {entry.dtype} {entry.shape}, not a matrix of floating point numbers"
                )
        elif _OTHER_FACTOR.fullmatch(key) or config.values.get("modules_to_save"):
            other.append(key)
        else:
            defects.append(f"{key} is no name of PEFT's for a LoRA factor: it would be ignored")
    defects += _duplicates(file)
    return [module for module in modules if _is_whole(file, module, defects)], other, defects


def _magnitude_defects(file: TensorFileReader, lengths: Mapping[str, int]) -> list[str]:
    """Modules of a weight-decomposed adapter without magnitudes, or with some that are no numbers or too few."""
    keys = {module_of_magnitude(key): key for key in file.entries}
    defects = []
    for name, length in lengths.items():
        if name not in keys:
            defects.append(f"{name} has no magnitudes, but {CONFIG} says use_dora")
            continue
        magnitudes = file.read(keys[name])
        if magnitudes.shape != (length,):
            defects.append(
                f"the magnitudes of {name} are {tuple(magnitudes.shape)}, not one for each of {length} rows"
            )
        elif not torch.isfinite(magnitudes).all():
            defects.append(f"the magnitudes of {name} hold NaN or infinite values")
    return defects


def _duplicates(file: TensorFileReader) -> list[str]:
    """Factors that are stored under two names, such as lora_A.weight and lora_A.default.weight."""
    names = Counter(_plain_key(key) for key in file.entries)
    return [
        f"{key} is stored {count} times, under different names" for key, count in names.items() if count > 1
    ]


def _plain_key(key: str) -> str:
    key = _ADAPTER_NAME.sub(r".\1.weight", key)
    while key.startswith(_PREFIX):
        key = key.removeprefix(_PREFIX)
    return key


def _is_whole(file: TensorFileReader, module: str, defects: list[str]) -> bool:
    """Whether both factors are there and fit together; a defect says what is not."""
    entries: list[TensorEntry] = []
    for side in "AB":
        entry = file.entries.get(factor_key(module, side))
        if entry is None:
            defects.append(f"{module} has no lora_{side}")
            return False
        entries.append(entry)
    if any(len(e.shape) != 2 or 0 in e.shape or not e.dtype.is_floating_point for e in entries):
        return False  # already a defect, found where its tensors were sorted
    if entries[0].shape[0] != entries[1].shape[1]:
        defects.append(
            f"lora_A {entries[0].shape} and lora_B {entries[1].shape} of {module} do not fit together"
        )
        return False
    return True


def _report(file: TensorFileReader, config: AdapterConfig, module: str, defects: list[str]) -> ModuleReport:
    a, b = (file.read(factor_key(module, side)) for side in "AB")
    rank, said = a.shape[0], config.rank(module)
    if rank != said:
        defects.append(f"{module} has rank {rank}, but {CONFIG} says {said}: it does not load")
    finite = True
    for side, tensor in (("A", a), ("B", b)):
        if not torch.isfinite(tensor).all():
            finite = False
            kind = "NaN" if tensor.isnan().any() else "infinite values"
            defects.append(f"lora_{side} of {module} holds {kind}")
    scale = config.scale(module)
    if not finite:
        return ModuleReport(module, rank, (b.shape[0], a.shape[1]), scale, float("nan"), float("nan"))
    singular = singular_values(Update(a.float(), b.float(), scale))
    return ModuleReport(
        module, rank, (b.shape[0], a.shape[1]), scale, float(singular.norm()), effective_rank(singular)
    )


def _unmatched_targets(config: AdapterConfig, modules: list[str]) -> list[str]:
    """Names in target_modules that no module of the file has."""
    targets = config.values.get("target_modules")
    if not isinstance(targets, list) or not modules:
        return []
    return [
        f"target_modules names {target}, but no tensor belongs to such a module"
        for target in targets
        if not any(module == target or module.endswith(f".{target}") for module in modules)
    ]


def _compare_modules(
    config: AdapterConfig, shapes: Mapping[str, tuple[int, int]], others: Collection[str], model: BaseModel
) -> list[str]:
    """Modules of the adapter that the base lacks or has in another shape, and the base's targets without tensors.

    others: modules that have tensors of another kind, such as embeddings.
    """
    known = {*shapes, *others}
    names = stored_modules(model, shapes)
    linears: dict[str, tuple[int, ...]] = {}
    for shard in model.shards:
        with TensorFileReader(model.folder / shard) as reader:
            for entry in reader.entries.values():
                if entry.name.endswith(".weight") and len(entry.shape) == 2:
                    linears[names[entry.name]] = entry.shape
    defects = []
    for name, shape in shapes.items():
        stored = linears.get(name)
        if stored is None:
            defects.append(f"the base has no linear layer {name}")
        elif stored not in (shape, shape[::-1] if config.values.get("fan_in_fan_out") else shape):
            defects.append(f"{name} is {shape} in the adapter and {stored} in the base")
    if config.values.get("target_modules") != "all-linear":
        defects += [
            f"{name} of the base is a target, but the adapter has no tensors for it: PEFT leaves it untrained"
            for name in linears
            if config.is_target(name) and name not in known
        ]
    return defects


def _compare_hash(adapter: Path, model: BaseModel, defects: list[str]) -> str:
    """Compare the base's hash with the one that `dynrank export` wrote; return a line on it."""
    found, trained_on = model_hash(model.folder), read_record(adapter).get("base_model_hash")
    if trained_on is None:
        return f"{model.folder}, hash {found[:12]}; the adapter says no hash of the base it was trained on"
    if found != trained_on:
        defects.append(f"it was trained on a base with the hash {trained_on[:12]}, not on {model.folder}")
        return f"{model.folder}, hash {found[:12]}"
    return f"{model.folder}, the one it was trained on (hash {found[:12]})"


def _rank_table(modules: list[ModuleReport]) -> list[str]:
    """Return a row for each layer, a column for each kind of linear layer."""
    cells: dict[str, dict[str, int]] = {}
    for module in modules:
        numbers = re.findall(r"\.(\d+)\.", f".{module.name}.")
        row, kind = numbers[0] if numbers else "-", module.name.rsplit(".", 1)[-1]
        by_kind = cells.setdefault(row, {})
        by_kind[kind] = by_kind.get(kind, 0) + module.rank
    kinds = list(dict.fromkeys(m.name.rsplit(".", 1)[-1] for m in modules))
    rows = sorted(cells, key=lambda row: (row == "-", int(row) if row != "-" else 0))
    table = [["layer", *kinds], *([row, *(str(cells[row].get(kind, 0)) for kind in kinds)] for row in rows)]
    return _aligned(table)


def _module_table(modules: list[ModuleReport]) -> list[str]:
    table = [["module", "rank", "effective", "scale", "norm of dW"]]
    for m in modules:
        table.append([m.name, str(m.rank), f"{m.effective_rank:.2f}", _number(m.scale), f"{m.norm:.4g}"])
    return _aligned(table)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _number(value: float) -> str:
    return f"{value:.6g}"
