"""Ask the training processes of one run on this machine to save and stop, and wait until they have.

Launchers do not pass all signals on.

python launcher/stop_training.py output.dir=runs/quickstart/run
"""

import sys
from contextlib import suppress

import psutil


def main(override: str) -> None:
    """Send SIGTERM to every process that was started as `python -u launcher/train.py ... OVERRIDE`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if override in words and len(words) > 2 and words[2].endswith("launcher/train.py"):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
                found.append(process)
    psutil.wait_procs(found)


if __name__ == "__main__":
    main(sys.argv[1])
