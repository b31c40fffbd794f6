"""Generating with a model: what is asked is written down first, what comes back as it comes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_eval.engines import Engine, Request, start_engine
from dynrank_eval.engines import model as models
from dynrank_eval.evaluation import Job
from dynrank_eval.jsonl import read_rows
from dynrank_eval.output import replace_file
from dynrank_eval.tasks import fingerprint

SETTINGS, SAMPLES = "generation.json", "samples.jsonl"
# On so many prompts an adapter must make a difference.
_PROBES = 8


@dataclass(frozen=True)
class Setup:
    """The model and how it is asked, apart from the tasks.

    Attributes:
        dtype: "bfloat16", "float16" or "float32".
        max_new_tokens: None: the protocol's.
        temperature: 0 is greedy.
    """

    model: str
    adapter: Path | None
    engine: str
    dtype: str
    max_new_tokens: int | None
    temperature: float
    seed: int


@dataclass(frozen=True)
class _Wanted:
    """A completion to make, and the beginning of its line in samples.jsonl."""

    key: tuple[str, str, int]
    row: dict[str, Any]
    request: Request


def generate(
    setup: Setup,
    jobs: Sequence[Job],
    output: Path,
    start: Callable[[str, models.ModelSpec], Engine] = start_engine,
) -> None:
    """Leaves all completions in `output`/samples.jsonl; those that are there already are kept.

    `start` gives the engine, and is called only where something is missing.

    Raises:
        RunError: the folder holds something else, or the adapter changes nothing.
        ModelError: the model cannot be loaded or is too short for the prompts.
    """
    models.check_model(setup.model)
    if setup.adapter is not None:
        models.adapter_rank(setup.adapter)
    tokenizer = models.load_tokenizer(setup.model)
    wanted = [item for job in jobs for item in _wanted(setup, job, tokenizer)]
    longest = max(len(item.request.prompt) + item.request.max_new_tokens for item in wanted)
    models.check_length(setup.model, longest)
    settings = _settings(setup, jobs, wanted)
    done = _begun(output, settings)
    missing = [item for item in wanted if item.key not in done]
    if not missing:
        return
    probe = tuple(dict.fromkeys(tuple(item.request.prompt) for item in wanted))[:_PROBES]
    spec = models.ModelSpec(setup.model, setup.adapter, setup.dtype, longest, probe)
    engine = start(setup.engine, spec)
    _begin(output, settings)
    with open(output / SAMPLES, "a", encoding="utf-8") as file:
        for place, completion in engine.generate([item.request for item in missing]):
            row = {**missing[place].row, "completion": completion.text, "tokens": completion.n_tokens}
            file.write(json.dumps(row) + "\n")
            file.flush()
    _sort(output, [item.key for item in wanted])


def _wanted(setup: Setup, job: Job, tokenizer: Any) -> Iterator[_Wanted]:
    prompts = job.prompts(tokenizer)
    budget = setup.max_new_tokens or job.protocol.max_new_tokens
    encoded = models.encode_prompts(tokenizer, prompts)
    for problem, prompt, ids in zip(job.problems, prompts, encoded, strict=True):
        for sample in range(job.samples):
            key = (job.task.name, problem.task_id, sample)
            row = {"task": key[0], "task_id": key[1], "sample": sample, "prompt": prompt}
            request = Request(ids, budget, job.protocol.stop, setup.temperature, _seed(setup.seed, key))
            yield _Wanted(key, row, request)


def _seed(seed: int, key: tuple[str, str, int]) -> int:
    """Of one sample's draws, so that a run that goes on draws what an undisturbed one would have."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:4], "big") >> 1


def _settings(setup: Setup, jobs: Sequence[Job], wanted: Sequence[_Wanted]) -> dict[str, Any]:
    """Everything that completions depend on."""
    adapter = None if setup.adapter is None else str(setup.adapter)
    return {
        **asdict(setup),
        "adapter": adapter,
        "model_files": models.model_files(setup.model),
        "adapter_files": [] if adapter is None else models.model_files(adapter),
        "tasks": {job.task.name: [job.protocol.name, len(job.problems), job.samples] for job in jobs},
        "prompts": fingerprint([[item.row["prompt"], item.request.max_new_tokens] for item in wanted]),
    }


def _begun(output: Path, settings: dict[str, Any]) -> set[tuple[str, str, int]]:
    """The samples that the folder holds; RunError where they were made in another way."""
    path = output / SETTINGS
    if not path.is_file():
        if (output / SAMPLES).exists():
            raise RunError(f"--output {output} holds samples.jsonl of something else; name another folder.")
        return set()
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); name another --output or remove the folder.") from error
    changed = [key for key in settings if json.loads(json.dumps(settings[key])) != before.get(key)]
    if changed:
        raise RunError(
            f"--output {output} was begun with another {changed[0]} ({_short(before.get(changed[0]))}, now "
            f"{_short(settings[changed[0]])}); name another folder or remove it."
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
    """A run that was killed may have left half a line."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _begin(output: Path, settings: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _sort(output: Path, keys: Sequence[tuple[str, str, int]]) -> None:
    """The order of the problems, whatever finished first."""
    rows = read_rows(output / SAMPLES, ("task", "task_id", "sample"))
    by_key = {(row["task"], row["task_id"], row["sample"]): row for _, row in rows}
    lines = (json.dumps(by_key[key]) + "\n" for key in keys)
    replace_file(output / SAMPLES, "".join(lines))
