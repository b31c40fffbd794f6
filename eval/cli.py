"""`dynrank-eval`: scores models, or completions that somebody generated."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrank_ds.errors import DynrankError

if TYPE_CHECKING:
    from dynrank_eval.evaluation import Generation, Job

_RUN_EXAMPLE = """example:
  dynrank-eval run --model merged --task gsm_symbolic,gsm8k --data-dir data --output scores"""
_SCORE_EXAMPLE = """example:
  dynrank-eval score --task humaneval --generations completions.jsonl --output scores"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user's mistake (one sentence on stderr, nothing written)."""
    args = _parser().parse_args(argv)
    args.command_line = shlex.join(["dynrank-eval", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.handler(args)
    except DynrankError as error:
        print(f"dynrank-eval: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dynrank-eval", description=__doc__, epilog=_RUN_EXAMPLE)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="run|score")

    run = _add_command(commands, "run", "generate with a model, then score", _RUN_EXAMPLE)
    run.set_defaults(handler=_run)
    run.add_argument("--model", required=True, help="model folder or hub id")
    run.add_argument("--adapter", type=Path, help="folder of a PEFT adapter for the model")
    run.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="default: vllm")
    run.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    run.add_argument("--max-new-tokens", type=_positive, help="default: the protocol's")

    score = _add_command(commands, "score", "score completions; needs no model", _SCORE_EXAMPLE)
    score.set_defaults(handler=_score)
    score.add_argument(
        "--generations",
        type=Path,
        required=True,
        help='JSONL of {"task_id", "completion"} or a samples.jsonl',
    )
    return parser


def _add_command(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    """A command with the options that `run` and `score` share."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--task",
        required=True,
        type=lambda names: names.split(","),
        help="one or more of gsm_symbolic, gsm_symbolic_unseen, gsm8k, humaneval, with commas",
    )
    command.add_argument("--data-dir", type=Path, help="folder with the tasks' data files")
    command.add_argument("--protocol", help="default: the task's (metamath-v1, humaneval-v1)")
    command.add_argument("--limit", type=_positive, help="only the first N problems of each task")
    command.add_argument(
        "--output", type=Path, required=True, help="folder for results.json and samples.jsonl"
    )
    return command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _run(args: argparse.Namespace) -> None:
    from dynrank_eval import output
    from dynrank_eval.engines import model as models
    from dynrank_eval.engines import start_engine
    from dynrank_eval.evaluation import Generation, prepare

    output.check_output(args.output)
    models.check_model(args.model)
    if args.adapter is not None:
        models.adapter_rank(args.adapter)
    jobs = prepare(args.task, args.protocol, args.data_dir, args.limit)
    tokenizer = models.load_tokenizer(args.model)
    encoded = [models.encode_prompts(tokenizer, job.prompts()) for job in jobs]
    budgets = [args.max_new_tokens or job.protocol.max_new_tokens for job in jobs]
    longest = max(
        len(ids) + budget for prompts, budget in zip(encoded, budgets, strict=True) for ids in prompts
    )
    models.check_length(args.model, longest)
    engine = start_engine(args.engine, models.ModelSpec(args.model, args.adapter, args.dtype, longest))

    start = time.monotonic()
    generations = []
    for job, prompts, budget in zip(jobs, encoded, budgets, strict=True):
        completions = engine.generate(prompts, budget, job.protocol.stop)
        pairs = zip(completions, job.prompts(), strict=True)
        generations.append([Generation(done.text, prompt, done.n_tokens) for done, prompt in pairs])
    details = {
        "model": args.model,
        "adapter": None if args.adapter is None else str(args.adapter),
        "engine": args.engine,
        "dtype": args.dtype,
        "max_new_tokens": dict(zip(args.task, budgets, strict=True)),
        "generation_seconds": round(time.monotonic() - start, 3),
    }
    _finish(args, jobs, generations, details)


def _score(args: argparse.Namespace) -> None:
    from dynrank_eval import output
    from dynrank_eval.evaluation import prepare, read_generations

    output.check_output(args.output)
    jobs = prepare(args.task, args.protocol, args.data_dir, args.limit)
    generations = read_generations(args.generations, jobs)
    _finish(args, jobs, generations, {"generations": str(args.generations)})


def _finish(
    args: argparse.Namespace,
    jobs: "Sequence[Job]",
    generations: "Sequence[Sequence[Generation]]",
    details: dict[str, Any],
) -> None:
    """Judges, writes both files, prints the table."""
    from dynrank_eval import output
    from dynrank_eval.evaluation import judge, summarise

    start = time.monotonic()
    samples = [judge(job, given) for job, given in zip(jobs, generations, strict=True)]
    tasks = {job.task.name: summarise(job, done) for job, done in zip(jobs, samples, strict=True)}
    run = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": args.command_line,
        **details,
        "scoring_seconds": round(time.monotonic() - start, 3),
        "versions": output.versions(),
    }
    output.write_output(args.output, [sample for done in samples for sample in done], tasks, run)
    _print_table(tasks)


def _print_table(tasks: dict[str, Any]) -> None:
    print(f"{'task':<20} {'n':>5} {'score':>7}  {'95% interval':<16} {'invalid':>7} {'timeouts':>8}")
    for name, entry in tasks.items():
        low, high = entry["interval"]
        interval = f"{low:.1%} to {high:.1%}"
        print(
            f"{name:<20} {entry['n']:>5} {entry['score']:>7.1%}  {interval:<16} "
            f"{entry['invalid_rate']:>7.1%} {entry['timeouts']:>8}"
        )
