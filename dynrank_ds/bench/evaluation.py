"""What the evaluator costs: beside bare vLLM on the same prompts, and as a command with one engine and with several."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dynrank_ds.bench.figures import Figure
from dynrank_ds.bench.pairs import paired_ratio
from dynrank_ds.errors import DynrankError, RecipeError
from dynrank_ds.recipe import Recipe

TOKENS = 16
"""New tokens of a completion. Longer ones make the evaluator's share smaller."""
PAIRS = 6


def measure_eval(recipe: Recipe, quick: bool) -> Iterator[Figure]:
    """Yield prompts per second of `dynrank-eval run`, and the seconds of an evaluation by those of bare vLLM.

    Greedy, on 320 (quick: 32) problems of the recipe's first task, by its model without an adapter. The command is
    timed from its start, imports and engines included, with one engine and with one on each GPU (on a CPU with two).
    The ratio is of one engine that has started: all that the evaluator does, by vLLM's own `generate` on ready token
    ids.

    Raises:
        RecipeError: the recipe names no task or no folder of its data.
        DynrankError: vLLM is not installed, or an evaluation failed.
    """
    if not recipe.eval.tasks or recipe.eval.data_dir is None:
        raise RecipeError(
            "eval.tasks and eval.data_dir must be given: the benchmark eval asks these problems"
        )
    if importlib.util.find_spec("vllm") is None:
        raise DynrankError("the benchmark eval needs vLLM, which is not installed: see eval/README.md")
    prompts = 32 if quick else 320
    with tempfile.TemporaryDirectory() as folder:
        for engines in (1, max(2, torch.cuda.device_count())):
            seconds = _command(recipe, prompts, engines, Path(folder) / str(engines))
            yield Figure(
                f"dynrank-eval run, engines: {engines}",
                f"{prompts / seconds:.2f} prompts/s, {seconds:.1f} s for {prompts}",
                {"engines": engines, "prompts": prompts, "seconds": seconds},
            )
    bare, whole = _in_this_process(recipe, prompts)
    ratio = paired_ratio(whole, bare, PAIRS, torch.device("cpu"))
    yield Figure(
        "evaluation / bare vLLM",
        f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        {"prompts": prompts, "tokens": TOKENS, "ratio": ratio.median, "interval_95": [ratio.low, ratio.high]},
    )


def _command(recipe: Recipe, prompts: int, engines: int, output: Path) -> float:
    """Return the seconds of `dynrank-eval run`."""
    command = [sys.executable, "-m", "dynrank_eval.cli", "run", "--model", str(recipe.model.path)]
    command += ["--task", recipe.eval.tasks[0], "--data-dir", str(recipe.eval.data_dir)]
    command += ["--limit", str(prompts), "--max-new-tokens", str(TOKENS)]
    command += ["--engines", str(engines), "--output", str(output)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DynrankError(f"dynrank-eval run ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - began


def _in_this_process(recipe: Recipe, prompts: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return vLLM's own generation and an evaluation of the same prompts, by one engine."""
    from vllm import SamplingParams

    from dynrank_eval import GenerationSettings, Selection, evaluate
    from dynrank_eval.engines import model as models
    from dynrank_eval.engines import start_engine
    from dynrank_eval.generation import resolve_dtype
    from dynrank_eval.jobs import prepare

    path, data_dir = str(recipe.model.path), Path(str(recipe.eval.data_dir))
    selection = Selection([recipe.eval.tasks[0]], data_dir=data_dir, limit=prompts)
    settings = GenerationSettings(path, max_new_tokens=TOKENS)
    [job] = prepare(selection, generating=True, scoring=True)
    tokenizer = models.load_tokenizer(path)
    ids = models.encode_prompts(tokenizer, job.prompts(tokenizer))
    spec = models.ModelSpec(path, None, resolve_dtype("auto"), max(map(len, ids)) + TOKENS)
    engine: Any = start_engine("vllm", spec)
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, stop=list(job.protocol.stop))

    def bare() -> None:
        engine.llm.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            evaluate(selection, generating=settings, output_dir=Path(folder), engine=engine)

    return bare, whole
