"""`dynrank-eval`: scores models, or completions that somebody generated."""

import argparse
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrank_ds.errors import DynrankError, RecipeError, RunError

if TYPE_CHECKING:
    from dynrank_eval.evaluation import Job
    from dynrank_eval.generation import Setup

_EXAMPLES = {
    "run": "dynrank-eval run --model merged --task gsm8k,math,humaneval --data-dir data --output scores",
    "generate": "dynrank-eval generate --model base --adapter adapter --task gsm8k --output samples",
    "score": "dynrank-eval score --task humaneval --generations completions.jsonl --output scores",
    "compare": "dynrank-eval compare scores-base scores-tuned",
    "sandbox-check": "dynrank-eval sandbox-check",
}
_SETUP_KEYS = ("model", "adapter", "engine", "dtype", "max_new_tokens", "temperature", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user's mistake (one sentence on stderr, no result written)."""
    logging.basicConfig(format="%(message)s")
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
    generate = _command(commands, "generate", "generate with a model; goes on where it stopped", _generate)
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
        type=lambda names: names.split(","),
        help="one or more, with commas, of gsm8k, gsm_symbolic, gsm_symbolic_unseen, math, humaneval, "
        "humaneval_plus, mbpp, mbpp_plus",
    )
    command.add_argument("--data-dir", type=Path, help="folder with the tasks' data files")
    command.add_argument(
        "--protocol", help="default: the task's (metamath-v1 for answers, evalplus-v1 for code)"
    )
    command.add_argument("--limit", type=_positive, help="only the first N problems of each task")
    command.add_argument("--n", type=_positive, default=1, help="completions per problem; default: 1")
    command.add_argument(
        "--output", type=Path, required=True, help="folder for results.json and samples.jsonl"
    )


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="model folder or hub id")
    command.add_argument("--adapter", type=Path, help="folder of a PEFT adapter for the model")
    command.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="default: vllm")
    dtypes = ("bfloat16", "float16", "float32")
    command.add_argument("--dtype", choices=dtypes, default="bfloat16", help="default: bfloat16")
    command.add_argument("--max-new-tokens", type=_positive, help="default: the protocol's")
    command.add_argument("--temperature", type=_temperature, default=0.0, help="default: 0, greedy")
    command.add_argument("--seed", type=int, default=0, help="of the draws at a temperature; default: 0")


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


def _run(args: argparse.Namespace) -> None:
    from dynrank_eval.generation import SAMPLES, generate

    jobs = _jobs(args, generating=True, scoring=True)
    setup = _setup(args)
    start = time.monotonic()
    generate(setup, jobs, args.output)
    details = {key: getattr(args, key) for key in _SETUP_KEYS}
    details["adapter"] = None if args.adapter is None else str(args.adapter)
    details["generation_seconds"] = round(time.monotonic() - start, 3)
    _finish(args, jobs, args.output / SAMPLES, details)


def _generate(args: argparse.Namespace) -> None:
    from dynrank_eval.generation import generate

    jobs = _jobs(args, generating=True, scoring=False)
    generate(_setup(args), jobs, args.output)
    print(
        f"{sum(len(job.problems) * job.samples for job in jobs)} completions are in {args.output}/samples.jsonl"
    )


def _score(args: argparse.Namespace) -> None:
    from dynrank_eval.generation import SAMPLES, SETTINGS

    # What is written there is what was scored: the model's other completions would be gone, or others in their place.
    itself = args.generations.absolute() == (args.output / SAMPLES).absolute()
    if itself or (args.output / SETTINGS).is_file():
        raise RunError(
            f"--output {args.output} holds completions of a model; name another folder for the scores."
        )
    jobs = _jobs(args, generating=False, scoring=True)
    _finish(args, jobs, args.generations, {"generations": str(args.generations)})


def _jobs(args: argparse.Namespace, generating: bool, scoring: bool) -> "list[Job]":
    from dynrank_eval import output
    from dynrank_eval.evaluation import Choice, prepare

    for k in getattr(args, "k", ()):
        if k > args.n:
            raise RecipeError(f"--k {k} needs at least {k} completions per problem, --n is {args.n}.")
    output.check_output(args.output)
    choice = Choice(
        args.task, args.protocol, args.data_dir, args.limit, args.n, getattr(args, "allow_network", False)
    )
    return prepare(choice, generating, scoring)


def _setup(args: argparse.Namespace) -> "Setup":
    from dynrank_eval.generation import Setup

    if args.n > 1 and args.temperature == 0:
        raise RecipeError(
            f"--n {args.n} at --temperature 0 makes the same completion {args.n} times; set one above 0."
        )
    return Setup(**{key: getattr(args, key) for key in _SETUP_KEYS})


def _finish(
    args: argparse.Namespace, jobs: "Sequence[Job]", generations: Path, details: dict[str, Any]
) -> None:
    """Judges, writes both files, prints the table."""
    from dynrank_eval import output
    from dynrank_eval.evaluation import judge, read_generations, summarise

    given = read_generations(generations, jobs)
    start = time.monotonic()
    samples = [judge(job, completions) for job, completions in zip(jobs, given, strict=True)]
    tasks = {job.task.name: summarise(job, done, args.k) for job, done in zip(jobs, samples, strict=True)}
    machine = {name: fact for job in jobs for name, fact in job.task.machine().items()}
    run = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": args.command_line,
        **details,
        "scoring_seconds": round(time.monotonic() - start, 3),
        **machine,
        "versions": output.versions(),
    }
    output.write_output(args.output, [sample for done in samples for sample in done], tasks, run)
    _print_table(tasks)


def _print_table(tasks: dict[str, Any]) -> None:
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


def _compare(args: argparse.Namespace) -> None:
    from dynrank_eval.comparison import compare
    from dynrank_eval.output import check_output, replace_file

    if args.output is not None:
        check_output(args.output.parent)
        if args.output.is_dir():
            raise RunError(f"--output {args.output} is a folder; name a file.")
    comparisons = compare(args.first, args.second)
    header = f"{'task':<20} {'n':>5} {'difference':>10}  {'95% interval':<18} {'McNemar p':>9}"
    print(f"{header} {'both':>6} {'first':>6} {'second':>6} {'neither':>7}")
    for done in comparisons:
        low, high = done.interval
        interval = f"{low:+.1%} to {high:+.1%}"
        counts = " ".join(
            f"{len(ids):>6}" for ids in (done.both, done.only_first, done.only_second, done.neither)
        )
        print(
            f"{done.task:<20} {done.n:>5} {done.difference:>+10.1%}  {interval:<18} {done.p_value:>9.2g} {counts}"
        )
    print(
        "first and second: solved by that one only; the difference is the second's share of solved minus the first's"
    )
    if any(done.samples > 1 for done in comparisons):
        print("solved: at least half of a problem's samples are correct; these shares are not the scores")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(
            args.output, json.dumps({done.task: done.as_json() for done in comparisons}, indent=2) + "\n"
        )


def _sandbox_check(args: argparse.Namespace) -> int:
    """Exit code 1 where something escapes."""
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
