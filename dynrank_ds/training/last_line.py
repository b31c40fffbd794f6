"""An error as the last line that a person sees: launchers write much after the process that failed has ended."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path

_SECONDS = 60
"""For which the launcher's end is waited for: it gives the other processes 30 seconds."""


def print_error(error: object) -> None:
    """Print the error, and once more when the launcher has ended that started this process, if one did.

    At once, for a container ends with its launcher; and again, for `torchrun` prints a page and `deepspeed` some lines
    after it.
    """
    line = f"error: {error}\n"
    sys.stderr.write(line)
    sys.stderr.flush()
    if _is_launcher(os.getppid()):
        _write_after(os.getppid(), line)


def _is_launcher(process: int) -> bool:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _write_after(process: int, line: str) -> None:
    """Write the line to standard error when `process` ends, from a process that is no child of any launcher."""
    try:
        ended = os.pidfd_open(process)
    except OSError:
        return  # it has ended, or the kernel cannot tell (before Linux 5.3)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(ended)
        return
    # Nothing of the interpreter that was forked is used from here on, and it must not go on.
    with suppress(OSError):
        os.setsid()
        if os.fork() == 0 and select.select([ended], [], [], _SECONDS)[0]:
            os.write(2, line.encode())
    os._exit(0)
