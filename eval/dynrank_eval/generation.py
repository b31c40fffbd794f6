"""Generating with a model: the settings are written first, each completion as it is finished."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dynrank_ds import dtypes
from dynrank_ds.errors import RunError
from dynrank_eval.engines import Engine, Request, serving, start_engine
from dynrank_eval.engines import model as models
from dynrank_eval.jobs import Job
from dynrank_eval.jsonl import read_rows
from dynrank_eval.output import SAMPLES, SETTINGS, replace_file
from dynrank_eval.tasks import fingerprint

logger = logging.getLogger(__name__)
# An adapter must change the output on one of this many prompts.
_PROBES = 8


@dataclass(frozen=True)
class GenerationSettings:
    """The model and how it is asked, apart from the tasks.

    Attributes:
        engine: "vllm" or "hf".
        engines: how many of them at a time, each on a GPU of its own (on a CPU beside each other).
        dtype: "auto", "bf16", "fp16" or "fp32".
        max_new_tokens: None: the protocol's.
        temperature, top_p: None: the protocol's; a temperature of 0 is greedy.
        batch_invariant: vLLM's kernels whose results do not depend on the batch; slower.
    """

    model: str
    adapter: Path | None = None
    engine: str = "vllm"
    dtype: str = "auto"
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    batch_invariant: bool = False
    engines: int = 1

    def budget(self, job: Job) -> int:
        """Return the number of new tokens after which a completion ends."""
        return self.max_new_tokens or job.protocol.max_new_tokens

    def sampling(self, job: Job) -> tuple[float, float]:
        """Return temperature and top-p."""
        temperature = job.protocol.temperature if self.temperature is None else self.temperature
        return temperature, job.protocol.top_p if self.top_p is None else self.top_p


@dataclass(frozen=True)
class _Wanted:
    """A completion to generate, and the beginning of its line in samples.jsonl."""

    key: tuple[str, str, int]
    row: dict[str, Any]
    request: Request


def generate(
    settings: GenerationSettings,
    jobs: Sequence[Job],
    output: Path,
    start: Callable[[str, models.ModelSpec], Engine] = start_engine,
) -> None:
    """Leave all completions in `output`/samples.jsonl; those that are there already are kept.

    Args:
        start: returns the engine; called only where a completion is missing.

    Raises:
        RunError: the folder holds something else, or the adapter changes nothing.
        ModelError: the model cannot be loaded or is too short for the prompts.
    """
    models.check_model(settings.model)
    if settings.adapter is not None:
        models.adapter_rank(settings.adapter)
    if settings.batch_invariant:
        serving.check_batch_invariance(settings.engine)
    if settings.engine == "vllm":
        serving.check_heads(settings.model)
    tokenizer = models.load_tokenizer(settings.model)
    wanted = [item for job in jobs for item in _wanted(settings, job, tokenizer)]
    longest = max(len(item.request.prompt) + item.request.max_new_tokens for item in wanted)
    models.check_length(settings.model, longest)
    dtype = resolve_dtype(settings.dtype)
    identity = _identity(replace(settings, dtype=dtype), jobs, wanted)
    done = _begun(output, identity)
    missing = [item for item in wanted if item.key not in done]
    if not missing:
        return
    probe = tuple(dict.fromkeys(tuple(item.request.prompt) for item in wanted))[:_PROBES]
    spec = models.ModelSpec(
        settings.model, settings.adapter, dtype, longest, probe, settings.batch_invariant, settings.engines
    )
    engine = start(settings.engine, spec)
    _begin(output, identity)
    with open(output / SAMPLES, "a", encoding="utf-8") as file:
        for place, completion in engine.generate([item.request for item in missing]):
            row = {
                **missing[place].row,
                "completion": completion.text,
                "tokens": completion.n_tokens,
                "max_new_tokens": missing[place].request.max_new_tokens,
                "truncated": completion.truncated,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
    _sort(output, [item.key for item in wanted])


def resolve_dtype(dtype: str) -> str:
    """Return the dtype that "auto" means on this machine, and say in one line which and why."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = dtypes.resolve_dtype(dtype, device)
    if dtype == "auto":
        logger.info("--dtype auto is %s", reason)
    elif warning := dtypes.slow_dtype_warning(dtype, device):
        logger.warning("--dtype %s: %s", dtype, warning)
    return name


def _wanted(settings: GenerationSettings, job: Job, tokenizer: Any) -> Iterator[_Wanted]:
    prompts = job.prompts(tokenizer)
    encoded = models.encode_prompts(tokenizer, prompts)
    temperature, top_p = settings.sampling(job)
    for problem, prompt, ids in zip(job.problems, prompts, encoded, strict=True):
        for sample in range(job.samples):
            key = (job.task.name, problem.task_id, sample)
            row = {"task": key[0], "task_id": key[1], "sample": sample, "prompt": prompt}
            seed = _seed(settings.seed, key)
            request = Request(ids, settings.budget(job), job.protocol.stop, temperature, top_p, seed)
            yield _Wanted(key, row, request)


def _seed(seed: int, key: tuple[str, str, int]) -> int:
    """Return the seed of one sample's draws, so that a resumed run draws what an uninterrupted one would have."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:4], "big") >> 1


def _identity(settings: GenerationSettings, jobs: Sequence[Job], wanted: Sequence[_Wanted]) -> dict[str, Any]:
    """Return everything that completions depend on; the number of engines is not of it."""
    adapter = None if settings.adapter is None else str(settings.adapter)
    asked = {key: value for key, value in asdict(settings).items() if key != "engines"}
    return {
        **asked,
        "adapter": adapter,
        "model_files": models.model_files(settings.model),
        "adapter_files": [] if adapter is None else models.model_files(adapter),
        "tasks": {job.task.name: [job.protocol.name, len(job.problems), job.samples] for job in jobs},
        "prompts": fingerprint([[item.row["prompt"], item.request.max_new_tokens] for item in wanted]),
    }


def _begun(output: Path, identity: dict[str, Any]) -> set[tuple[str, str, int]]:
    """Return the samples that the folder holds; RunError where they were generated in another way."""
    path = output / SETTINGS
    if not path.is_file():
        if (output / SAMPLES).exists():
            raise RunError(f"--output {output} holds samples.jsonl of something else; name another folder.")
        return set()
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); name another --output or remove the folder.") from error
    changed = [key for key in identity if json.loads(json.dumps(identity[key])) != before.get(key)]
    if changed:
        raise RunError(
            f"--output {output} was begun with another {changed[0]} ({_short(before.get(changed[0]))}, now "
            f"{_short(identity[changed[0]])}); name another folder or remove it."
        )
    _drop_torn_line(output / SAMPLES)
    if not (output / SAMPLES).is_file():
        return set()
    rows = read_rows(output / SAMPLES, ("task", "task_id", "sample", "completion"))
    return {(row["task"], row["task_id"], row["sample"]) for _, row in rows}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _drop_torn_line(path: Path) -> None:
    """Remove the half line that a killed run may have left."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _begin(output: Path, identity: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / SETTINGS, json.dumps(identity, indent=2) + "\n")


def _sort(output: Path, keys: Sequence[tuple[str, str, int]]) -> None:
    """Sort the file by problem, whatever was finished first."""
    rows = read_rows(output / SAMPLES, ("task", "task_id", "sample"))
    by_key = {(row["task"], row["task_id"], row["sample"]): row for _, row in rows}
    lines = (json.dumps(by_key[key]) + "\n" for key in keys)
    replace_file(output / SAMPLES, "".join(lines))
