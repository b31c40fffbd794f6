"""From a checkpoint to a PEFT adapter folder."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dynrank_ds.checkpoint.adapter import LinearShape, TrainedAdapter
from dynrank_ds.checkpoint.files import newest_checkpoint
from dynrank_ds.export.folder import staged_folder
from dynrank_ds.export.model_card import CARD, RESULTS, evaluation_scores, model_card, provenance
from dynrank_ds.export.peft_writer import DTYPES, AdapterSource, Format, refuse_format, write_adapter
from dynrank_ds.export.pissa_forms import ChangeSource, write_residual_form

logger = logging.getLogger(__name__)

ExportFormat = Format | Literal["pissa"]


def export_adapter(
    run: Path, output: Path, format: ExportFormat = "peft", dtype: str = "fp32", scores: Path | None = None
) -> None:
    """Write the adapter of a run's newest checkpoint as the PEFT folder `output`.

    Args:
        run: the run directory.
        output: a folder that is new, empty, or an earlier export of the same run and format.
        format: `peft`, every module at its own rank; `padded`, one rank for all; or of a PiSSA run `pissa`, a base
            without the initial triples, and the trained ones.
        dtype: fp32, bf16 or fp16, of the stored factors.
        scores: an output folder of dynrank-eval, for the model card; by default RUN/eval where that is one.

    Raises:
        RunError: for a run without a checkpoint, a damaged or untrained one, values beyond the range of `dtype`,
            `scores` without results, or an output folder of something else.
    """
    if scores is None and (run / "eval" / RESULTS).is_file():
        scores = run / "eval"
    export_checkpoint(newest_checkpoint(run), output, format, dtype, scores)


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    format: ExportFormat = "peft",
    dtype: str = "fp32",
    scores: Path | None = None,
) -> None:
    """Write the adapter of the checkpoint folder `checkpoint`, with a model card and dynrank.json on its origin.

    Raises:
        RunError: as `export_adapter`.
    """
    checkpoint = checkpoint.resolve()
    with TrainedAdapter(checkpoint) as adapter:
        if format != "pissa":
            refuse_format(adapter, format)
        record = {
            "from": str(checkpoint),
            "format": format,
            "dtype": dtype,
            **provenance(adapter),
        }
        change: AdapterSource = ChangeSource(adapter) if adapter.subtracted else adapter
        linears = adapter.linears if format == "pissa" else change.linears
        card = model_card(adapter, linears, format, evaluation_scores(scores) if scores else {})
        source = _source(record)
        inputs = (checkpoint, checkpoint.parent, checkpoint.parent.parent)
        with staged_folder(output, record, lambda there: _source(there) == source, inputs) as folder:
            if format == "pissa":
                write_residual_form(adapter, folder, output.resolve(), DTYPES[dtype])
            else:
                write_adapter(change, folder, format, DTYPES[dtype])
            (folder / CARD).write_text(card)
        _tell_ranks(linears, adapter.weight_decomposed)


def _source(record: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return from an adapter's dynrank.json: its run, whether its newest or best checkpoint, and the format."""
    if "from" not in record:
        return None
    checkpoint = Path(record["from"])
    kind, _, _ = checkpoint.name.partition("-")
    return str(checkpoint.parent), kind, record.get("format", "peft")


def _tell_ranks(linears: Mapping[str, LinearShape], weight_decomposed: bool) -> None:
    """Say what rank an engine that serves the adapter must allow, which heads that are modules make far larger."""
    if weight_decomposed:
        logger.info(
            "the adapter is weight-decomposed, which vLLM does not serve: merge it with `dynrank merge`"
        )
        return
    name, largest = max(linears.items(), key=lambda item: item[1].rank)
    heads = f", the sum of the ranks of its {largest.heads} heads" if largest.heads > 1 else ""
    logger.info(
        "adapter of rank up to %d (%s)%s: vLLM's max_lora_rank must allow it", largest.rank, name, heads
    )
