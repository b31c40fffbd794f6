"""The report's page while the run trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dynrank_ds.files import read_json
from dynrank_ds.report.page import write_report


def watch_report(run: Path, compare: Sequence[Path] = (), seconds: int = 10) -> None:
    """Write the page every `seconds` until the run ends; an open page loads itself again as often.

    Of a run that was killed the end is not seen: interrupt the command.

    Raises:
        RunError: as `write_report`.
    """
    while _is_running(run / "state.json"):
        write_report(run, compare=compare, renew_seconds=seconds)
        time.sleep(seconds)


def _is_running(state: Path) -> bool:
    return not state.is_file() or read_json(state)["state"] in ("starting", "running")
