"""`dynrank-eval`: scores models, or completions that were generated elsewhere."""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrank_ds.errors import DynrankError, RunError

if TYPE_CHECKING:
    from dynrank_eval import GenerationSettings, Selection

_EXAMPLES = {
    "run": "dynrank-eval run --model merged --task gsm8k,math,humaneval --data-dir data --output scores",
    "generate": "dynrank-eval generate --model base --adapter adapter --task gsm8k --output samples",
    "score": "dynrank-eval score --task humaneval --generations completions.jsonl --output scores",
    "compare": "dynrank-eval compare scores-base scores-tuned",
    "sandbox-check": "dynrank-eval sandbox-check",
}
# The names on the command line, and those that torch has for the same.
_DTYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
_DTYPES |= {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 for the user's mistake (one sentence on stderr, no result written)."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dynrank_eval").setLevel(logging.INFO)
    args = _parser().parse_args(argv)
    args.command_line = shlex.join(["dynrank-eval", *(sys.argv[1:] if argv is None else argv)])
    try:
        return int(args.handler(args) or 0)
    except DynrankError as error:
        print(f"dynrank-eval: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynrank-eval",
        description=__doc__,
        epilog=f"example:\n  {_EXAMPLES['run']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(_EXAMPLES))

    run = _command(commands, "run", "generate with a model, then score", _run)
    generate = _command(commands, "generate", "generate with a model; resumes where it stopped", _generate)
    score = _command(commands, "score", "score completions; needs no model", _score)
    for command in (run, generate, score):
        _add_task_options(command)
    for command in (run, generate):
        _add_model_options(command)
    for command in (run, score):
        _add_scoring_options(command)
    score.add_argument(
        "--generations",
        type=Path,
        required=True,
        help='JSONL of {"task_id", "completion"} or a samples.jsonl',
    )

    compare = _command(commands, "compare", "two evaluations, problem by problem", _compare)
    compare.add_argument("first", type=Path, help="output folder of `run` or `score`")
    compare.add_argument("second", type=Path, help="another, of the same tasks")
    compare.add_argument(
        "--output", type=Path, help="file for the comparison as JSON, with every problem's id"
    )

    check = _command(
        commands, "sandbox-check", "try to escape from the sandbox in every known way", _sandbox_check
    )
    check.add_argument("--workers", type=_positive, help="programs at a time; default: as many as CPUs")
    return parser


def _command(commands: Any, name: str, text: str, handler: Callable[..., Any]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {_EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(handler=handler)
    return command


def _add_task_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--task",
        required=True,
        type=lambda names: [name for name in names.split(",") if name.strip()],
        help="one or more, with commas, of gsm8k, gsm_symbolic, gsm_symbolic_unseen, math, humaneval, "
        "humaneval_plus, mbpp, mbpp_plus",
    )
    command.add_argument("--data-dir", type=Path, help="folder with the tasks' data files")
    command.add_argument(
        "--protocol", help="default: the task's (dynrank-math-v1 for answers, dynrank-code-v1 for code)"
    )
    command.add_argument("--limit", type=_positive, help="only N problems of each task, the first ones")
    command.add_argument(
        "--skip", type=_not_negative, default=0, help="leave out the first N problems of each task"
    )
    command.add_argument(
        "--n", type=_positive, help="completions per problem; default: the protocol's, mostly 1"
    )
    command.add_argument(
        "--output", type=Path, required=True, help="folder for results.json and samples.jsonl"
    )


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="model folder or hub id")
    command.add_argument("--adapter", type=Path, help="folder of a PEFT adapter for the model")
    command.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="default: vllm")
    command.add_argument(
        "--engines",
        type=_positive,
        default=1,
        help="how many engines share the prompts, each on a GPU of its own; default: 1, over all GPUs",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", *_DTYPES),
        default="auto",
        help="default: auto, bf16 where the device computes it natively, else fp32",
    )
    command.add_argument("--max-new-tokens", type=_positive, help="default: the protocol's")
    command.add_argument("--temperature", type=_temperature, help="default: the protocol's, mostly 0, greedy")
    command.add_argument("--top-p", type=_top_p, help="default: the protocol's, mostly 1")
    command.add_argument("--seed", type=int, default=0, help="of the draws at a temperature; default: 0")
    command.add_argument(
        "--batch-invariant",
        action="store_true",
        help="vLLM's kernels for GPUs whose results do not depend on the batch: slower, a greedy score stays the same",
    )


def _add_scoring_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--k",
        type=lambda text: [_positive(part) for part in text.split(",")],
        default=[1],
        help="pass@k for these k, with commas, none above --n; default: 1",
    )
    command.add_argument(
        "--allow-network",
        action="store_true",
        help="run programs even where this machine cannot keep them off the network",
    )


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 100")
    return value


def _top_p(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return value


def _run(args: argparse.Namespace) -> None:
    from dynrank_eval import evaluate

    settings = _settings(args)
    results = evaluate(
        _selection(args), generating=settings, output_dir=args.output, ks=args.k, command=args.command_line
    )
    _print_table(results.tasks)


def _generate(args: argparse.Namespace) -> None:
    from dynrank_eval.evaluate import generate_only

    count = generate_only(_selection(args), _settings(args), args.output)
    print(f"{count} completions are in {args.output}/samples.jsonl")


def _score(args: argparse.Namespace) -> None:
    from dynrank_eval import evaluate

    results = evaluate(
        _selection(args),
        completions=args.generations,
        output_dir=args.output,
        ks=args.k,
        command=args.command_line,
    )
    _print_table(results.tasks)


def _selection(args: argparse.Namespace) -> "Selection":
    from dynrank_eval import Selection

    allow_network = getattr(args, "allow_network", False)
    return Selection(args.task, args.protocol, args.data_dir, args.limit, args.n, allow_network, args.skip)


def _settings(args: argparse.Namespace) -> "GenerationSettings":
    from dynrank_eval import GenerationSettings

    chosen = {field.name: getattr(args, field.name) for field in fields(GenerationSettings)}
    return GenerationSettings(**{**chosen, "dtype": _DTYPES.get(args.dtype, args.dtype)})


def _print_table(tasks: Mapping[str, dict[str, Any]]) -> None:
    print(
        f"{'task':<20} {'n':>5} {'score':>7}  {'95% interval':<16} {'invalid':>7} {'timeouts':>8}  protocol"
    )
    for name, entry in tasks.items():
        low, high = entry["interval"]
        interval = f"{low:.1%} to {high:.1%}"
        print(
            f"{name:<20} {entry['n']:>5} {entry['score']:>7.1%}  {interval:<16} "
            f"{entry['invalid_rate']:>7.1%} {entry['timeouts']:>8}  {entry['protocol']}"
        )
        others = [f"{way} {share:.1%}" for way, share in entry.get("grades", {}).items()]
        others += [f"pass@{k} {share:.1%}" for k, share in entry["pass_at"].items() if k != "1"]
        if others:
            print(f"{'':<20} {', '.join(others)}")
        deciders = [f"{grader} {count}" for grader, count in entry["decided_by"].items()]
        if deciders:
            print(f"{'':<20} decided by {', '.join(deciders)}")
        for group, values in entry.get("groups", {}).items():
            shares = [f"{value} {found['score']:.1%} of {found['n']}" for value, found in values.items()]
            print(f"{'':<20} by {group}: {', '.join(shares)}")


def _compare(args: argparse.Namespace) -> None:
    from dynrank_eval.comparison import compare
    from dynrank_eval.output import check_output, replace_file

    if args.output is not None:
        check_output(args.output.parent)
        if args.output.is_dir():
            raise RunError(f"--output {args.output} is a folder; name a file.")
    comparisons = compare(args.first, args.second)
    written = json.dumps({done.task: done.as_json() for done in comparisons}, indent=2) + "\n"
    if args.output is not None and args.output.exists() and args.output.read_bytes() != written.encode():
        raise RunError(
            f"--output {args.output} is there and holds something else; name another file or remove it."
        )
    print(
        f"{'task':<20} {'n':>5} {'difference':>10}  {'95% interval':<18} {'p':>9} "
        f"{'first':>6} {'second':>6} {'equal':>6}"
    )
    for done in comparisons:
        low, high = done.interval
        interval = f"{low:+.1%} to {high:+.1%}"
        counts = " ".join(f"{len(ids):>6}" for ids in (done.first_higher, done.second_higher, done.equal))
        print(
            f"{done.task:<20} {done.n:>5} {done.difference:>+10.1%}  {interval:<18} {done.p_value:>9.2g} {counts}"
        )
    print(
        "first, second: problems on which that one scores higher; the difference is the second's score minus the "
        "first's"
    )
    if any(done.samples > 1 for done in comparisons):
        print("several completions per problem: means per problem, bootstrap interval, permutation test")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.output, written)


def _sandbox_check(args: argparse.Namespace) -> int:
    """Try the sandbox; return 1 where something escapes."""
    from dynrank_eval.sandbox.attempts import attempt_all

    report = attempt_all(args.workers)
    for aspect, mechanism in report.isolation.covers().items():
        print(f"{aspect:<12} {mechanism or 'NOT isolated on this machine'}")
    width = max(len(attempt.name) for attempt in report.attempts)
    for attempt in report.attempts:
        print(
            f"{'held' if attempt.held else 'ESCAPED':<8} {attempt.name:<{width}}  {attempt.outcome:<10} {attempt.aim}"
        )
    for harm in report.harm:
        print(f"HARM     {harm}")
    escaped = sum(not attempt.held for attempt in report.attempts)
    print(f"{len(report.attempts) - escaped} of {len(report.attempts)} attempts held")
    return 1 if escaped or report.harm else 0


if __name__ == "__main__":
    sys.exit(main())
