"""Several engines at a time, each in a process of its own with one GPU, as if they were one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from dynrank_ds import errors
from dynrank_ds.errors import DynrankError, MachineError
from dynrank_eval.engines import Completion, Request
from dynrank_eval.engines.model import ModelSpec


class ParallelEngine:
    """Shares the requests out in turn to `spec.engines` processes and joins what they give.

    A completion is the one that a single engine gives, as far as that one does not depend on its batch.
    """

    def __init__(self, name: str, spec: ModelSpec) -> None:
        one = replace(spec, engines=1)
        self._processes = [_start(name, one, place) for place in range(spec.engines)]
        for process in self._processes:
            _ready(process)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Yield each request's index and completion, as they finish."""
        arrived: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        count = len(self._processes)
        for place, process in enumerate(self._processes):
            share = [asdict(request) for request in requests[place::count]]
            Thread(target=_exchange, args=(process, share, place, arrived), daemon=True).start()
        working = count
        while working:
            place, message = arrived.get()
            if message is None:
                working -= 1
            elif "error" in message:
                raise _error(message)
            else:
                index = place + count * message["index"]
                yield index, Completion(message["text"], tuple(message["token_ids"]), message["truncated"])

    def __del__(self) -> None:
        for process in getattr(self, "_processes", ()):
            process.kill()
            process.wait()


def _start(name: str, spec: ModelSpec, place: int) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else []
    # Without GPUs the variable means nothing.
    environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)] if devices else str(place)
    process = subprocess.Popen(
        [sys.executable, "-m", "dynrank_eval.engines.parallel"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    adapter = None if spec.adapter is None else str(spec.adapter)
    _send(process, {"name": name, "spec": {**asdict(spec), "adapter": adapter}})
    return process


def _send(process: "subprocess.Popen[bytes]", message: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def _ready(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    message = json.loads(
        process.stdout.readline() or b'{"error": "it ended at once", "kind": "MachineError"}'
    )
    if "error" in message:
        raise _error(message)


def _error(message: dict[str, Any]) -> DynrankError:
    kind = getattr(errors, message["kind"], MachineError)
    found: DynrankError = kind(message["error"])
    return found


def _exchange(
    process: "subprocess.Popen[bytes]",
    share: list[dict[str, Any]],
    place: int,
    arrived: "SimpleQueue[tuple[int, dict[str, Any] | None]]",
) -> None:
    """Send an engine its requests and pass on what it answers, until it has answered all."""
    assert process.stdout is not None
    _send(process, share)
    for _ in share:
        line = process.stdout.readline()
        if not line:
            arrived.put(
                (place, {"error": f"engine {place} ended while it generated.", "kind": "MachineError"})
            )
            return
        arrived.put((place, json.loads(line)))
    arrived.put((place, None))


def _serve() -> None:
    """Play one engine: load the model, then answer lists of requests with a line for each completion."""
    from dynrank_eval.engines import start_engine

    # What libraries print must not look like an answer.
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())
    spec = asked["spec"]
    spec["adapter"] = None if spec["adapter"] is None else Path(spec["adapter"])
    spec["probe"] = tuple(map(tuple, spec["probe"]))
    try:
        engine = start_engine(asked["name"], ModelSpec(**spec))
    except DynrankError as error:
        output.write(json.dumps({"error": str(error), "kind": type(error).__name__}) + "\n")
        return
    output.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        requests = [Request(**{**row, "stop": tuple(row["stop"])}) for row in json.loads(line)]
        for index, done in engine.generate(requests):
            message = {
                "index": index,
                "text": done.text,
                "token_ids": done.token_ids,
                "truncated": done.truncated,
            }
            output.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    _serve()
