"""A sandboxed process: confines itself, says "ready", then is the solution or its judge.

Started by the runner as `python -s -S THIS_FOLDER NAME` with a JSON request on stdin; the name only tells
processes apart from outside. Imports nothing of the package.
"""

import json
import os
import sys

import candidate
import judge
from confine import confine
from wire import Channel


def main() -> None:
    request = json.load(sys.stdin)
    report = request["report"]
    try:
        confine(request["confinement"])
    except (ImportError, OSError, ValueError) as error:
        os.write(report, f"failed: {type(error).__name__}: {error}\n".encode()[:500])
        sys.exit(1)
    os.write(report, b"ready\n")
    channel = Channel(request["reader"], request["writer"])
    if "solution" in request:
        # From here on the report is out of the solution's reach.
        os.close(report)
        candidate.serve(request["solution"], request["tolerant"], channel)
    else:
        for line in judge.verdicts(request["prelude"], request["names"], request["tests"], channel):
            os.write(report, line.encode() + b"\n")


main()
