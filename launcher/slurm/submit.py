"""Submits a training to SLURM, and with --evaluate its evaluation.

    python launcher/slurm/submit.py --recipe my.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00

The recipe is checked here, before anything waits in a queue, with its model, data and number of processes, and where
--gpu-memory-gib is given with `dynrank plan`. Recipe and code are copied into RUN/slurm, where RUN is the recipe's
output.dir: what is edited afterwards does not change the job.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from dynrank_ds.errors import DynrankError, MachineError, RecipeError, RunError
from dynrank_ds.files import replace_text

if TYPE_CHECKING:
    from dynrank_ds.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).resolve().parent
JOB = "job.json"
_EXAMPLES = {"time": "12:00:00", "partition": "gpu", "account": "project", "qos": "normal"}
_CODE = {  # from the checkout -> into RUN/slurm/code, as the installed packages lie
    "dynrank_ds": "dynrank_ds",
    "recipes": "dynrank_ds/recipes",
    "ds_configs": "dynrank_ds/ds_configs",
    "eval/dynrank_eval": "dynrank_eval",
    "launcher": "launcher",
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        submit(arguments)
    except DynrankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Submit a training to SLURM.",
        epilog="example: python launcher/slurm/submit.py --recipe my.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 "
        "--evaluate",
    )
    parser.add_argument("--recipe", required=True, help="as of launcher/train.py")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--nodes", default="1", help="N, or MIN-MAX: as many as there are when it starts")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="0 for training on CPUs")
    parser.add_argument("--processes-per-node", type=int, help="by default one per GPU")
    parser.add_argument("--cpus-per-process", type=int, default=1, help="CPU cores; default: 1")
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        help="memory of one GPU: what does not fit by `dynrank plan` is refused, and the plan printed",
    )
    parser.add_argument(
        "--gpu", choices=("h100", "h200", "a100"), default="h100", help="whose speeds the plan takes"
    )
    for name in ("time", "partition", "account", "qos"):
        parser.add_argument(f"--{name}", help=f"as of sbatch, e.g. {_EXAMPLES[name]}")
    parser.add_argument("--after", metavar="JOB", help="begin after this job has ended without an error")
    parser.add_argument(
        "--stop-before",
        type=int,
        default=180,
        help="seconds before the time limit at which it saves and is requeued: longer than a step and a checkpoint",
    )
    parser.add_argument("--wrap", default="", help="command in front, e.g. 'apptainer exec --nv image.sif'")
    parser.add_argument("--python", help="interpreter; by default this one, and with --wrap python")
    parser.add_argument("--evaluate", action="store_true", help="score the recipe's eval.tasks afterwards")
    parser.add_argument("--evaluate-options", default="", help="more options of dynrank-eval generate")
    parser.add_argument("--dry-run", action="store_true", help="check, print the batch files, write nothing")
    return parser


def submit(arguments: argparse.Namespace) -> None:
    """Check, freeze, submit, and print what to watch.

    Raises:
        DynrankError: what cannot be run; nothing is written then.
    """
    from dynrank_ds.recipe import load_recipe

    processes = arguments.processes_per_node or arguments.gpus_per_node
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = Path(recipe.output.dir).absolute()
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": str(run)})})
    _check(recipe, arguments, processes)
    files = _render(recipe, run, arguments, processes)
    if arguments.dry_run:
        for name, text in files.items():
            print(f"== {run / 'slurm' / name}\n{text}")
        return
    if shutil.which("sbatch") is None:
        raise MachineError("sbatch is not found: submit where SLURM's commands are, or give --dry-run")
    _refuse_second_job(run)
    folder = run / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    _freeze_code(folder / "code")
    replace_text(folder / "recipe.yaml", recipe.dump())
    for name, text in files.items():
        replace_text(folder / name, text)
    jobs = _submit_all(folder, list(files), arguments.after)
    submitted = {
        "jobs": jobs,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
    }
    replace_text(folder / JOB, json.dumps(submitted, indent=2) + "\n")
    print(f"job {', '.join(f'{job} ({name})' for name, job in jobs.items())}; watch it with")
    print(f"    squeue --jobs {','.join(jobs.values())}")
    print(f"    tail -F {folder}/job.log {folder}/log-{jobs['train']}-*.txt")
    print(f"    python launcher/slurm/status.py {shlex.quote(str(run))}")
    print(f"save and end it with scancel --signal=TERM {jobs['train']}, then scancel {jobs['train']}")


def _check(recipe: Recipe, arguments: argparse.Namespace, processes: int) -> None:
    from dynrank_ds.commands.plan import plan_that_fits
    from dynrank_ds.commands.validate import validate
    from dynrank_ds.training.rundir import check_output

    if processes < 1:
        raise RecipeError("--gpus-per-node is 0: give --processes-per-node for training on CPUs")
    if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", arguments.nodes)):
        raise RecipeError(f"--nodes is '{arguments.nodes}': give a number, or MIN-MAX")
    fewest, most = int(match[1]), int(match[2] or match[1])
    for nodes in range(fewest, most + 1):
        recipe.accumulation(nodes * processes)
    if arguments.evaluate and not recipe.eval.tasks:
        raise RecipeError("--evaluate is given, but eval.tasks of the recipe names no task")
    check_output(Path(recipe.output.dir), resume=True)
    print(validate(recipe, fewest * processes), file=sys.stderr)
    if arguments.gpu_memory_gib is not None:
        # The fewest nodes have the least memory.
        machine = (fewest, processes, arguments.gpu_memory_gib, arguments.gpu)
        print(plan_that_fits(recipe, *machine), file=sys.stderr)


def _render(recipe: Recipe, run: Path, arguments: argparse.Namespace, processes: int) -> dict[str, str]:
    """Return the batch files by name, in the order in which they run."""
    common = [
        f"#SBATCH --{name}={value}"
        for name in ("partition", "account", "qos", "time")
        if (value := getattr(arguments, name))
    ]
    cpus = arguments.cpus_per_process
    alone = [*common, f"#SBATCH --cpus-per-task={cpus}"]
    gpus = arguments.gpus_per_node
    data = ["--data-dir", recipe.eval.data_dir] if recipe.eval.data_dir else []
    values = {
        "NAME": run.name,
        "NODES": arguments.nodes,
        "PROCESSES": processes,
        "CPUS": cpus,
        "CPUS_OF_NODE": cpus * processes,
        "FOLDER": run / "slurm",
        "RUN": run,
        "STOP_BEFORE": arguments.stop_before,
        "WRAP": arguments.wrap,
        "PYTHON": arguments.python or ("python" if arguments.wrap else sys.executable),
        "MODEL": shlex.quote(recipe.model.path),
        "TASKS": " ".join(recipe.eval.tasks),
        "LAST_TASK": len(recipe.eval.tasks) - 1,
        "EVALUATE_OPTIONS": " ".join([shlex.join(data), arguments.evaluate_options]).strip(),
        "SCORE_OPTIONS": shlex.join([*data, *_options_of_tasks(arguments.evaluate_options)]),
    }
    if re.search(r"[^\w./+=@-]", str(run)):
        raise RecipeError(f"output.dir {run}: SLURM's files need a path of letters, digits and ./_+=@-")
    options = {
        "train.sbatch": [*common, f"#SBATCH --gpus-per-node={gpus}"] if gpus else common,
        "evaluate.sbatch": [*alone, "#SBATCH --gpus=1"] if gpus else alone,
        "score.sbatch": alone,
    }
    names = list(options) if arguments.evaluate else ["train.sbatch"]
    return {name: _filled(name, {**values, "OPTIONS": "\n".join(options[name])}) for name in names}


def _options_of_tasks(text: str) -> list[str]:
    """Return those of the options of `dynrank-eval generate` that say which problems: scoring needs them too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("limit", "n", "protocol"):
        parser.add_argument(f"--{name}")
    given = vars(parser.parse_known_args(shlex.split(text))[0])
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]


def _filled(name: str, values: dict[str, object]) -> str:
    text = (TEMPLATES / name).read_text()
    text = text.replace(
        "# submit.py filled in what stood between at signs.", f"# Written by submit.py from {name}."
    )
    return re.sub(r"@([A-Z_]+)@", lambda match: str(values[match[1]]), text)


def _freeze_code(folder: Path) -> None:
    """Copy the packages, and note the revision that they are of."""
    shutil.rmtree(folder, ignore_errors=True)
    for source, target in _CODE.items():
        shutil.copytree(
            ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    git = ["git", "-C", str(ROOT)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    mark = "+changes" if changes.stdout.strip() else ""
    (folder / "REVISION").write_text(f"{revision.stdout.strip() or 'unknown'}{mark}\n")


def _refuse_second_job(run: Path) -> None:
    file = run / "slurm" / JOB
    if not file.is_file() or shutil.which("squeue") is None:
        return
    job = json.loads(file.read_text())["jobs"]["train"]
    # A job that SLURM has forgotten is an error of squeue's.
    queued = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if queued and queued != "COMPLETED":
        raise RunError(f"job {job} of {run} is {queued}: wait for it, or end it with scancel {job}")


def _submit_all(folder: Path, names: list[str], after: str | None) -> dict[str, str]:
    jobs: dict[str, str] = {}
    for name in names:
        command = ["sbatch", "--parsable"]
        if after:
            command.append(f"--dependency=afterok:{after}")
        done = subprocess.run(
            [*command, str(folder / name)], capture_output=True, text=True, check=False, env=_environment()
        )
        if done.returncode:
            if jobs:
                subprocess.run(["scancel", *jobs.values()], check=False)
            raise MachineError(f"sbatch refused {folder / name}: {' '.join(done.stderr.split())}")
        after = jobs[name.removesuffix(".sbatch")] = done.stdout.strip().split(";")[0]
    return jobs


def _environment() -> dict[str, str]:
    """This process's environment, which the job inherits, without what a SLURM job around it would pass on."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_"))
    }


if __name__ == "__main__":
    sys.exit(main())
