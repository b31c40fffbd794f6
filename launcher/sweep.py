"""Runs a study: many recipes, each tuned over a grid, compared on the same problems.

    python launcher/sweep.py plan recipes/studies/one_machine.yaml
    python launcher/sweep.py recipes/studies/one_machine.yaml --workers 2
    python launcher/sweep.py report recipes/studies/one_machine.yaml

The same command again goes on where it stopped; started several times at once, by hand or as an array of jobs, each
takes the next run that no other works on.

Exit codes: 0 done; 75 stopped by a signal, with everything kept; 1 runs failed; 2 a mistake in the study.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from dynrank_ds.errors import DynrankError, RecipeError
from dynrank_ds.study.definition import Study, load_study
from dynrank_ds.study.runs import Commands, StoppedError
from dynrank_ds.study.work import check_problems, open_work, work_until_done

STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        study = load_study(arguments.study)
        n_tuning, n_final = check_problems(study)
        if arguments.action == "plan":
            print(_plan(study, n_tuning, n_final))
        elif arguments.action == "report":
            from dynrank_ds.study.report import write_study_report

            command = f"python launcher/sweep.py report {arguments.study}"
            print(write_study_report(study, command, n_tuning, n_final))
        elif arguments.workers > 1:
            return _start_workers(arguments.study, arguments.workers)
        else:
            return _work(study)
    except DynrankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a study of methods whose learning rates are tuned, or report on it.",
        epilog="example: python launcher/sweep.py recipes/studies/one_machine.yaml",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("run", "plan", "report"),
        default="run",
        help="plan: say what would be run and which difference it can detect; report: write the tables from the runs "
        "that are done",
    )
    parser.add_argument("study", type=Path, help="a YAML file")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="so many runs at a time; GPUs are shared out among them",
    )
    return parser


def _plan(study: Study, n_tuning: int, n_final: int) -> str:
    from dynrank_ds.study.report import design_text

    waiting = [f"{split:<7} {run.name}" for run, split in open_work(study)]
    return "\n".join([design_text(study, n_tuning, n_final), "", f"open now: {len(waiting)}", *waiting])


def _work(study: Study) -> int:
    commands = Commands(Path(__file__).resolve().parent)
    for one in _SIGNALS:
        signal.signal(one, commands.stop)
    try:
        failures = work_until_done(study, commands)
    except StoppedError:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _start_workers(study: Path, number: int) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if gpus and len(gpus) < number:
        raise RecipeError(
            f"--workers is {number}, and this machine has {len(gpus)} GPUs: give at most so many"
        )
    command = [sys.executable, str(Path(__file__).resolve()), str(study)]
    workers = []
    for index in range(number):
        own = ",".join(gpus[index * len(gpus) // number : (index + 1) * len(gpus) // number])
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": own} if gpus else dict(os.environ)
        workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
    for one in _SIGNALS:
        signal.signal(one, lambda *_: [worker.terminate() for worker in workers])
    codes = {worker.wait() for worker in workers} - {0}
    # A worker that was killed, or found what it cannot run, outweighs those that were stopped in order.
    return STOPPED if codes == {STOPPED} else min(1, len(codes))


if __name__ == "__main__":
    sys.exit(main())
