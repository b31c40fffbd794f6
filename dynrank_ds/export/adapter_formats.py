"""PEFT adapter folders from trained triples, in two formats."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dynrank_ds.checkpoint.adapter import TrainedAdapter
from dynrank_ds.checkpoint.files import newest_checkpoint
from dynrank_ds.errors import RunError
from dynrank_ds.export.folder import staged_folder
from dynrank_ds.export.peft_adapter import factor_key
from dynrank_ds.export.peft_config import CONFIG, WEIGHTS
from dynrank_ds.tensorfile import TensorEntry, TensorFileWriter

_log = logging.getLogger(__name__)

AdapterWriter = Callable[[TrainedAdapter, Path], None]


def export_adapter(run: Path, output: Path, format: Literal["peft", "padded"] = "peft") -> None:
    """Write the adapter of a run's newest checkpoint as the PEFT folder `output`.

    Args:
        run: the run directory.
        output: a folder that is new, empty, or an earlier export of the same run and format.
        format: `peft`, every module at its own rank, or `padded`, one rank for all.

    Raises:
        RunError: for a run without a checkpoint, a damaged or untrained one, or an output folder of something
            else.
    """
    export_checkpoint(newest_checkpoint(run), output, format)


def export_checkpoint(checkpoint: Path, output: Path, format: Literal["peft", "padded"] = "peft") -> None:
    """Write the adapter of the checkpoint folder `checkpoint`.

    Raises:
        RunError: as `export_adapter`.
    """
    checkpoint = checkpoint.resolve()
    with TrainedAdapter(checkpoint) as adapter:
        record = {
            "from": str(checkpoint),
            "format": format,
            "method": adapter.method,
            "step": adapter.step,
            "base_model": adapter.base_model,
            "base_model_hash": adapter.base_model_hash,
        }
        source = _source(record)
        inputs = (checkpoint, checkpoint.parent, checkpoint.parent.parent)
        with staged_folder(output, record, lambda there: _source(there) == source, inputs) as folder:
            _WRITERS[format](adapter, folder)
        _tell_ranks(adapter)


def _source(record: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Of an adapter's dynrank.json: the checkpoints of which run, the newest or the best, in which format."""
    if "from" not in record:
        return None
    checkpoint = Path(record["from"])
    kind, _, _ = checkpoint.name.partition("-")
    return str(checkpoint.parent), kind, record.get("format", "peft")


def _write_peft(adapter: TrainedAdapter, folder: Path) -> None:
    """PEFT files in which every module keeps its own rank and modules of rank 0 are left out.

    Where heads are modules a module's rank is the sum of theirs: PEFT knows no module structure.

    e is folded into B; the scale is PEFT's alpha / r. Patterns list every module by its full name: PEFT and
    vLLM take the first key that matches a module's name or a dotted suffix of it, so longer names come first.
    """
    ranks = {name: linear.rank for name, linear in adapter.linears.items() if linear.rank > 0}
    if not ranks:
        raise RunError(f"Every module of step {adapter.step} has rank 0: the adapter changes nothing")
    names = sorted(ranks, key=lambda name: (-len(name), name))
    alphas = {name: _plain(adapter.linears[name].scale * ranks[name]) for name in names}
    largest = max(names, key=lambda name: ranks[name])
    uniform = len({(ranks[name], alphas[name]) for name in names}) == 1
    config = _config(adapter, list(ranks), ranks[largest], alphas[largest])
    if not uniform:
        config |= {"rank_pattern": {name: ranks[name] for name in names}, "alpha_pattern": alphas}
    _write(folder, config, adapter, ranks, ((name, *adapter.triples(name)) for name in ranks))


def _write_padded(adapter: TrainedAdapter, folder: Path) -> None:
    """PEFT files with one rank for all modules: the largest, filled up with zero rows.

    Modules of rank 0 are zeros. The scale is folded into B, so that alpha = r: right also on engines that
    ignore `rank_pattern`.
    """
    rank = max(linear.rank for linear in adapter.linears.values())
    if rank == 0:
        raise RunError(f"Every module of step {adapter.step} has rank 0: the adapter changes nothing")
    config = _config(adapter, list(adapter.linears), rank, rank)
    _write(folder, config, adapter, dict.fromkeys(adapter.linears, rank), _padded_triples(adapter, rank))


def _tell_ranks(adapter: TrainedAdapter) -> None:
    """Says what rank an engine that serves the adapter must allow, which heads that are modules make far larger."""
    name, largest = max(adapter.linears.items(), key=lambda item: item[1].rank)
    heads = f", the sum of the ranks of its {largest.heads} heads" if largest.heads > 1 else ""
    _log.info(
        "adapter of rank up to %d (%s)%s: vLLM's max_lora_rank must allow it", largest.rank, name, heads
    )


_WRITERS: dict[str, AdapterWriter] = {"peft": _write_peft, "padded": _write_padded}


def _padded_triples(adapter: TrainedAdapter, rank: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name, linear in adapter.linears.items():
        a, b = torch.zeros(rank, linear.in_features), torch.zeros(rank, linear.out_features)
        if linear.rank > 0:
            a[: linear.rank], b[: linear.rank] = adapter.triples(name)
            b *= linear.scale
        yield name, a, b


def _config(adapter: TrainedAdapter, targets: list[str], rank: int, alpha: float) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
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
    """Whole numbers as integers, which is how PEFT types alpha."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _write(
    folder: Path,
    config: dict[str, object],
    adapter: TrainedAdapter,
    ranks: dict[str, int],
    triples: Iterator[tuple[str, torch.Tensor, torch.Tensor]],
) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    entries = []
    for name, rank in ranks.items():
        linear = adapter.linears[name]
        entries.append(TensorEntry(factor_key(name, "A"), torch.float32, (rank, linear.in_features)))
        entries.append(TensorEntry(factor_key(name, "B"), torch.float32, (linear.out_features, rank)))
    changes = False
    with TensorFileWriter(folder / WEIGHTS, entries) as file:
        for name, a, b in triples:
            file.write(factor_key(name, "A"), a)
            file.write(factor_key(name, "B"), b.T)
            changes = changes or bool(a.any() and b.any())
    if not changes:
        raise RunError(
            f"Every lora_B of step {adapter.step} is zero: the adapter changes nothing; train for more steps"
        )
