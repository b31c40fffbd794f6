"""What the evaluator adds to bare vLLM generation of the same prompts.

    python -m dynrank_eval.overhead --model MODEL --data-dir DIR --output FILE.json

One engine, alternately: vLLM's own `generate` on ready token ids, and everything that `dynrank-eval run` does but for
the engine's start (loading problems, prompts, tokenising, generating, writing, scoring). GSM8K, greedy, all completions
of equal length. Processor time is compared beside wall time, since wall time means little on a busy machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynrank_eval import GenerationSettings, Selection, evaluate
from dynrank_eval.engines import model as models
from dynrank_eval.engines import start_engine
from dynrank_eval.generation import resolve_dtype
from dynrank_eval.jobs import prepare
from dynrank_eval.output import replace_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with gsm8k/test.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="file for the measurements")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per prompt; default: 32")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    selection = Selection(["gsm8k"], "metamath-v1", args.data_dir, args.prompts)
    settings = GenerationSettings(args.model, max_new_tokens=args.tokens)

    (job,) = prepare(selection, generating=True, scoring=True)
    ids = models.encode_prompts(models.load_tokenizer(args.model), job.prompts(None))
    longest = max(map(len, ids)) + args.tokens
    engine: Any = start_engine("vllm", models.ModelSpec(args.model, None, resolve_dtype("auto"), longest))

    def bare() -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=args.tokens, stop=list(job.protocol.stop))
        engine.llm.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            evaluate(selection, generating=settings, output_dir=Path(folder), engine=engine)

    # Kernels and caches are warm from the second call on.
    bare()
    pairs = [(_timed(bare), _timed(whole)) for _ in range(args.pairs)]
    report = {
        "prompts": len(ids),
        "tokens": args.tokens,
        "bare": [first for first, _ in pairs],
        "whole": [second for _, second in pairs],
        **{
            f"overhead_{clock}": statistics.median(
                second[clock] / first[clock] - 1 for first, second in pairs
            )
            for clock in ("wall", "processor")
        },
    }
    replace_file(args.output, json.dumps(report, indent=2) + "\n")


def _timed(action: Callable[[], None]) -> dict[str, float]:
    wall, processor = time.monotonic(), time.process_time()
    action()
    return {"wall": time.monotonic() - wall, "processor": time.process_time() - processor}


if __name__ == "__main__":
    main()
