"""`dynrank`: everything around training; `suggest-ranks` alone can also be started in several processes."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dynrank_ds.errors import DataError, DynrankError, ModelError
from dynrank_ds.files import DISK_FULL


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 an adapter with defects, 2 the user's mistake in one sentence on stderr."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        code: int | None = arguments.command(arguments)
    except DynrankError as error:
        print(f"error: {error}{_origin(arguments, error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        print(f"error: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynrank",
        description="Low-rank adapters whose ranks change, on DeepSpeed.",
        epilog="example: dynrank validate --recipe quickstart; dynrank COMMAND --help has one for each command",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    validate = _command(
        commands, "validate", _validate, "check a recipe, its model and its data, without a GPU"
    )
    validate.add_argument(
        "--processes", type=_positive, default=1, metavar="N", help="how many will train together (default 1)"
    )
    validate.epilog = "example: dynrank validate --recipe quickstart train.steps=50"

    prepare = _command(
        commands,
        "prepare",
        _prepare,
        "fetch a recipe's model and data and tokenise it, for machines without internet",
    )
    prepare.epilog = "example: dynrank prepare --recipe quickstart; afterwards HF_HUB_OFFLINE=1 can be set"
    plan = _command(
        commands, "plan", _plan, "predict memory, traffic and time on a number of GPUs, without any"
    )
    plan.epilog = (
        "example: dynrank plan --recipe llama2_70b+metamathqa+lora --gpus-per-node 8 --gpu-memory-gib 80"
    )
    plan.add_argument("--nodes", type=int, default=1, help="machines, by default 1")
    plan.add_argument("--gpus-per-node", type=int, required=True)
    plan.add_argument("--gpu-memory-gib", type=float, required=True, help="memory of one GPU")
    plan.add_argument(
        "--gpu", choices=("h100", "h200", "a100"), default="h100", help="whose speeds are taken"
    )
    plan.add_argument("--samples", type=int, help="rows of the data set, by default data.limit")
    for command in (validate, prepare, plan):
        command.add_argument(
            "--recipe",
            required=True,
            help="name of a shipped recipe, a YAML file, or parts MODEL+DATA+METHOD",
        )
        command.add_argument("overrides", nargs="*", help="section.key=value")

    export = _command(commands, "export", _export, "write a run's newest checkpoint as an adapter")
    export.epilog = "example: dynrank export --run runs/quickstart/run --output adapter --format padded"
    export.add_argument("--run", required=True, type=Path, help="run directory")
    export.add_argument("--output", required=True, type=Path, help="folder to make")
    export.add_argument(
        "--format",
        choices=("peft", "padded", "pissa"),
        default="peft",
        help="peft: rank_pattern and alpha_pattern; padded: one rank for all, right on every engine; "
        "pissa: of a run with adapter.init pissa, a residual base and the trained triples",
    )
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the factors")
    export.add_argument(
        "--scores", type=Path, help="output of dynrank-eval, for the card; by default RUN/eval"
    )

    merge = _command(commands, "merge", _merge, "add an adapter to its base model, tensor by tensor")
    merge.epilog = "example: dynrank merge --adapter adapter --output merged"
    merge.add_argument("--adapter", required=True, type=Path, help="PEFT adapter folder")
    merge.add_argument("--base", help="model folder or hub id; by default what the adapter names")
    merge.add_argument("--output", required=True, type=Path, help="folder to make")
    merge.add_argument("--workers", type=int, default=1, help="files of the base merged at one time")
    merge.add_argument(
        "--force", action="store_true", help="merge into another base than the adapter was trained on"
    )
    merge.add_argument(
        "--match-quantised-base",
        action="store_true",
        help="of an adapter that was trained in NF4: merge into the dequantised weights that it was trained against",
    )

    resize = _command(
        commands, "resize", _resize, "write a PEFT LoRA adapter at another size, as the best approximation"
    )
    resize.epilog = "example: dynrank resize --adapter adapter --output smaller --rank 2"
    resize.add_argument("--adapter", required=True, type=Path, help="PEFT adapter folder")
    resize.add_argument("--output", required=True, type=Path, help="folder to make")
    size = resize.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="mean rank of a module")
    size.add_argument("--parameters", type=int, help="at most so many elements of all factors")
    size.add_argument("--keep", type=float, help="share of the squared norm of all updates that must stay")
    size.add_argument("--threshold", type=float, help="the smallest singular value of s B A that stays")
    resize.add_argument(
        "--uniform",
        action="store_true",
        help="the same rank everywhere, instead of one threshold of singular values; can also grow",
    )

    inspect = _command(
        commands, "inspect", _inspect, "show what a PEFT LoRA adapter holds; exit with 1 if it has a defect"
    )
    inspect.epilog = "example: dynrank inspect --adapter adapter"
    inspect.add_argument("--adapter", required=True, type=Path, help="PEFT adapter folder")
    inspect.add_argument("--base", help="model folder or hub id to compare with: modules, shapes and hash")

    suggest = _command(
        commands, "suggest-ranks", _suggest_ranks, "suggest a rank for each layer from a calibration pass"
    )
    suggest.epilog = "example: dynrank suggest-ranks --recipe my.yaml --mean-rank 2 --batches 4"
    suggest.add_argument("--recipe", required=True, help="name of a shipped recipe, or a YAML file")
    budget = suggest.add_mutually_exclusive_group(required=True)
    budget.add_argument("--mean-rank", type=int, help="mean rank of a layer")
    budget.add_argument("--parameters", type=int, help="at most so many elements of all factors")
    suggest.add_argument("--batches", type=int, default=64, help="global batches to read; 64 by default")
    suggest.add_argument(
        "--score",
        choices=("gradient", "energy", "sensitivity", "pe_dyra"),
        default="gradient",
        help="gradient: norm of the gradient by the weight (default); energy: components of the inputs, as EVA; "
        "sensitivity, pe_dyra: of triples that are trained for so many steps",
    )
    suggest.add_argument("overrides", nargs="*", help="section.key=value")

    report = _command(commands, "report", _report, "write a page and pictures of what the ranks did")
    report.epilog = "example: dynrank report --run runs/quickstart/run"
    report.add_argument("--run", required=True, type=Path, help="run directory")
    report.add_argument(
        "--compare", nargs="+", default=[], type=Path, metavar="RUN", help="runs to show beside this one"
    )
    mode = report.add_mutually_exclusive_group()
    mode.add_argument("--watch", action="store_true", help="write the page again while the run trains")
    mode.add_argument(
        "--replay",
        action="store_true",
        help="instead of a page: plan every adjustment again from the logged scores; exit with 1 if one differs",
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: object, what: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(command=run)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes")
    return int(text)


def _origin(arguments: argparse.Namespace, error: DynrankError) -> str:
    """Return which command makes the model and data of the shipped recipe that lacks them, as the end of a message."""
    of_quickstart = str(getattr(arguments, "recipe", "")).startswith("quickstart")
    if of_quickstart and isinstance(error, DataError | ModelError):
        return (
            "; `bash launcher/quickstart.sh` makes model and data of the quickstart's recipes, for its folder"
        )
    return ""


def _validate(arguments: argparse.Namespace) -> None:
    from dynrank_ds.commands.validate import validate
    from dynrank_ds.recipe import load_recipe

    print(validate(load_recipe(arguments.recipe, arguments.overrides), arguments.processes))


def _prepare(arguments: argparse.Namespace) -> None:
    from dynrank_ds.commands.prepare import prepare
    from dynrank_ds.recipe import load_recipe

    print(prepare(load_recipe(arguments.recipe, arguments.overrides)))


def _plan(arguments: argparse.Namespace) -> None:
    from dynrank_ds.commands.plan import plan
    from dynrank_ds.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(
        plan(
            recipe,
            arguments.nodes,
            arguments.gpus_per_node,
            arguments.gpu_memory_gib,
            arguments.gpu,
            arguments.samples,
        )
    )


def _export(arguments: argparse.Namespace) -> None:
    from dynrank_ds.export import export_adapter

    export_adapter(arguments.run, arguments.output, arguments.format, arguments.dtype, arguments.scores)
    print(arguments.output)


def _merge(arguments: argparse.Namespace) -> None:
    from dynrank_ds.export import merge_adapter

    difference = merge_adapter(
        arguments.adapter,
        arguments.base,
        arguments.output,
        arguments.workers,
        arguments.force,
        arguments.match_quantised_base,
    )
    if difference is not None:
        print(f"largest difference of logits from the NF4 base with the adapter: {difference}")
    print(arguments.output)


def _resize(arguments: argparse.Namespace) -> None:
    from dynrank_ds.export.resizing import Size, changes_text, resize_adapter

    size = Size(arguments.rank, arguments.parameters, arguments.keep, arguments.threshold)
    print(changes_text(resize_adapter(arguments.adapter, arguments.output, size, arguments.uniform)))


def _inspect(arguments: argparse.Namespace) -> int:
    from dynrank_ds.export.inspection import inspect_adapter

    found = inspect_adapter(arguments.adapter, arguments.base)
    print(found.text())
    return 1 if found.defects else 0


def _suggest_ranks(arguments: argparse.Namespace) -> None:
    from dynrank_ds.commands.suggest_ranks import suggest_ranks, suggestion_text
    from dynrank_ds.recipe import load_recipe
    from dynrank_ds.zero import processes

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    ranks = suggest_ranks(
        recipe, arguments.score, arguments.batches, arguments.mean_rank, arguments.parameters
    )
    if processes.rank() == 0:
        print(suggestion_text(recipe, ranks))
    processes.stop()


def _report(arguments: argparse.Namespace) -> int:
    if arguments.replay:
        return _replay(arguments.run)
    from dynrank_ds.report import watch_report, write_report

    if arguments.watch:
        print(arguments.run / "report.html", flush=True)
        with suppress(KeyboardInterrupt):
            watch_report(arguments.run, arguments.compare)
    print(write_report(arguments.run, compare=arguments.compare))
    return 0


def _replay(run: Path) -> int:
    from dynrank_ds.commands.replay import replay

    number, differing = replay(run)
    if differing:
        print(f"{len(differing)} of {number} logged plans do not follow from the log: steps {differing}")
        return 1
    print(f"all {number} logged plans follow from the logged scores and ranks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
