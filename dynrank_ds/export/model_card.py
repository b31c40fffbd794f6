"""README.md of an exported adapter, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dynrank_ds.checkpoint.adapter import LinearShape, TrainedAdapter
from dynrank_ds.errors import RunError
from dynrank_ds.files import read_json

CARD = "README.md"
RESULTS = "results.json"


def evaluation_scores(folder: Path) -> dict[str, float]:
    """Return the score of each task, a share of 1, from an output folder of dynrank-eval.

    Raises:
        RunError: it is no such folder.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise RunError(f"{path} does not exist: name an output folder of dynrank-eval")
    try:
        return {task: float(entry["score"]) for task, entry in read_json(path)["tasks"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{path} is no result of dynrank-eval ({error!r})") from error


def model_card(
    adapter: TrainedAdapter, linears: Mapping[str, LinearShape], format: str, scores: Mapping[str, float]
) -> str:
    """Return the card: base and its hash, method, ranks, how to load it, scores and the whole recipe.

    Args:
        adapter: what was trained.
        linears: the layers at the ranks that are written.
        format: peft, padded or pissa.
        scores: by task, shares of 1; may be empty.
    """
    head = {
        "base_model": adapter.base_model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "dynamic-rank", adapter.method],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_kind(adapter)} adapter with a rank of its own in each layer",
        _facts(adapter, linears, format),
        "## Ranks\n\n" + _ranks(linears),
        "## Use\n\n" + _use(adapter, linears, format),
    ]
    if scores or adapter.held_out_loss is not None:
        parts.append("## Scores\n\n" + _scores(adapter.held_out_loss, scores))
    if adapter.recipe:
        parts.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(adapter.recipe, sort_keys=False)}```")
    return "\n\n".join(parts) + "\n"


def _kind(adapter: TrainedAdapter) -> str:
    return "Weight-decomposed LoRA (DoRA)" if adapter.weight_decomposed else "LoRA"


_FORMATS = {
    "peft": "each layer at its own rank",
    "padded": "padded to one rank, alpha = r",
    "pissa": "PiSSA: `residual_model`, the base without the initial triples, and `adapter`",
}


def _facts(adapter: TrainedAdapter, linears: Mapping[str, LinearShape], format: str) -> str:
    parameters = sum(s.rank * (s.in_features + s.out_features) for s in linears.values())
    parameters += sum(s.out_features for s in linears.values()) if adapter.weight_decomposed else 0
    rows = {
        "base model": f"`{adapter.base_model}`",
        "hash of the base": f"`{adapter.base_model_hash}`" if adapter.base_model_hash else "not recorded",
        "method": f"`{adapter.method}`, {adapter.step} steps",
        "total rank": f"{sum(s.rank for s in linears.values())} in {len(linears)} linear layers",
        "parameters": f"{parameters:,}",
        "format": _FORMATS[format],
    }
    if adapter.subtracted and format != "pissa":
        rows["initial values"] = (
            f"PiSSA: what changed against the base, of {sum(s.rank for s in adapter.linears.values())} trained triples "
            f"and {sum(adapter.subtracted.values())} initial ones"
        )
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _ranks(linears: Mapping[str, LinearShape]) -> str:
    kinds: dict[str, list[int]] = {}
    for name, shape in linears.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(shape.rank)
    lines = ["| layers called | number | smallest | mean | largest |", "|---|---|---|---|---|"]
    for kind, ranks in kinds.items():
        mean = sum(ranks) / len(ranks)
        lines.append(f"| {kind} | {len(ranks)} | {min(ranks)} | {mean:.2f} | {max(ranks)} |")
    return "\n".join(lines)


def _use(adapter: TrainedAdapter, linears: Mapping[str, LinearShape], format: str) -> str:
    largest = max(shape.rank for shape in linears.values())
    if adapter.weight_decomposed:
        engines = (
            "vLLM, SGLang and llama.cpp serve no magnitudes: merge the adapter with `dynrank merge` for them."
        )
    elif format != "padded":
        engines = (
            f"vLLM needs `max_lora_rank` of at least {largest}. Engines that ignore `rank_pattern` and `alpha_pattern` "
            "would apply wrong scales: export with `--format padded` for them."
        )
    else:
        engines = f"Every layer has rank {largest} and the scale 1: vLLM needs `max_lora_rank` of at least {largest}."
    residual = format == "pissa"
    base = json.dumps("THIS_FOLDER/residual_model" if residual else adapter.base_model)
    folder = "THIS_FOLDER/adapter" if residual else "THIS_FOLDER"
    return f"""{engines}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "{folder}")
```"""


def _scores(held_out_loss: float | None, scores: Mapping[str, float]) -> str:
    lines = ["| measured on | value |", "|---|---|"]
    if held_out_loss is not None:
        lines.append(f"| held-out loss | {held_out_loss:.4f} |")
    return "\n".join(
        [*lines, *(f"| {task} (dynrank-eval) | {score:.2%} |" for task, score in scores.items())]
    )


def provenance(adapter: TrainedAdapter) -> dict[str, Any]:
    """Return what dynrank.json says of the training that an adapter comes from."""
    return {
        "method": adapter.method,
        "step": adapter.step,
        "base_model": adapter.base_model,
        "base_model_hash": adapter.base_model_hash,
        "recipe": adapter.recipe,
    }
