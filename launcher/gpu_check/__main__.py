"""python -m launcher.gpu_check: see launcher/gpu_check.sh, which brings the small model and its data."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launcher.gpu_check.checks import CHECKS, MEASUREMENTS, Check, gpu_count
from launcher.gpu_check.outcome import (
    FAILED,
    MEASURED,
    PASSED,
    SKIPPED,
    CheckFailedError,
    NotHereError,
    Outcome,
    table,
)
from launcher.gpu_check.setting import Setting

NO_GPU = "error: there is no GPU here that PyTorch sees: gpu_check needs one, or give --device cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Make all checks; return 0, 1 where one failed, or 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.gpu_check",
        description="Find out what works on this machine's GPUs.",
        epilog="example: python -m launcher.gpu_check --model .cache/smollm2-135m-instruct --data train.jsonl "
        "--output runs/gpu_check",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a small Hugging Face model")
    parser.add_argument(
        "--data", type=Path, required=True, help="rows with query and response, as JSON lines"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for everything; a former one is replaced"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--processes", type=int, help="default: as many as GPUs; on a CPU 2")
    arguments = parser.parse_args(argv)
    processes = arguments.processes or (gpu_count() if arguments.device == "cuda" else 2)
    if arguments.device == "cuda" and not gpu_count():
        return _refuse(NO_GPU)
    for path in (arguments.model, arguments.data):
        if not path.exists():
            return _refuse(f"error: {path} does not exist: bash launcher/gpu_check.sh makes model and data")
    report = arguments.output / "gpu_check.json"
    if arguments.output.exists() and any(arguments.output.iterdir()) and not report.is_file():
        return _refuse(f"error: --output {arguments.output} holds something else: give a new folder")
    if arguments.output.exists():
        shutil.rmtree(arguments.output)
    arguments.output.mkdir(parents=True)
    folder = arguments.output.resolve()
    report.write_text("[]\n")
    setting = Setting(
        arguments.device, processes, folder, arguments.model.resolve(), arguments.data.resolve()
    )
    return _run_all(setting, report)


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def _run_all(setting: Setting, report: Path) -> int:
    outcomes = []
    for name, check in CHECKS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcomes.append(_outcome(name, check, setting))
        report.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    print(table(outcomes))
    return int(any(outcome.status == FAILED for outcome in outcomes))


def _outcome(name: str, check: Check, setting: Setting) -> Outcome:
    started = time.perf_counter()
    try:
        detail, status = check(setting), MEASURED if name in MEASUREMENTS else PASSED
    except NotHereError as reason:
        detail, status = str(reason), SKIPPED
    except (CheckFailedError, OSError, KeyError) as error:  # files of a run that failed earlier are not there
        detail, status = str(error) or repr(error), FAILED
    return Outcome(name, status, detail, time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
