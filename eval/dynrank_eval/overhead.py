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

from dynrank_eval.engines import model as models
from dynrank_eval.engines import start_engine
from dynrank_eval.evaluation import Choice, judge, prepare, read_generations, summarise
from dynrank_eval.generation import SAMPLES, Setup, generate
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
    choice = Choice(["gsm8k"], None, args.data_dir, args.prompts, 1, False)
    setup = Setup(args.model, None, "vllm", "bfloat16", args.tokens, 0.0, 0)

    (job,) = prepare(choice, generating=True, scoring=True)
    ids = models.encode_prompts(models.load_tokenizer(args.model), job.prompts(None))
    longest = max(map(len, ids)) + args.tokens
    engine: Any = start_engine("vllm", models.ModelSpec(args.model, None, "bfloat16", longest))

    def bare() -> None:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0.0, max_tokens=args.tokens, stop=list(job.protocol.stop))
        engine.llm.generate([{"prompt_token_ids": prompt} for prompt in ids], settings, use_tqdm=False)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            jobs = prepare(choice, generating=True, scoring=True)
            generate(setup, jobs, Path(folder), start=lambda name, spec: engine)
            (given,) = read_generations(Path(folder) / SAMPLES, jobs)
            summarise(jobs[0], judge(jobs[0], given), [1])

    # Kernels and caches are warm from the second time on.
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
