"""The quickstart, stopped by a signal: it saves, exports nothing, and says how to go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = """
DYNRANK_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DYNRANK_ROOT DYNRANK_DEVICE=cpu DYNRANK_PROCESSES=1 PATH="$DYNRANK_ROOT/bin:$PATH"
"""
TRAIN = """
import json, pathlib, signal, sys, time
run = pathlib.Path(next(w for w in sys.argv if w.startswith("output.dir=")).removeprefix("output.dir="))
def write(state):
    (run / "state.json").write_text(json.dumps({"state": state, "total_steps": 6}, indent=2))
def stop(*_):
    write("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
run.mkdir(parents=True, exist_ok=True)
write("running")
(run / "metrics.jsonl").write_text("{}\\n")
time.sleep(60)
"""
DEEPSPEED = """#!{python}
import subprocess, sys
script = sys.argv[sys.argv.index("launcher/train.py"):]
sys.exit(subprocess.run([sys.executable, "-u", script[0], "--local_rank=0", *script[1:]]).returncode)
"""
EXPORTED = "#!/bin/sh\necho exported\n"


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """The quickstart beside programs that only behave like what it starts, so that it takes seconds."""
    for name, text in {
        "launcher/environment.sh": ENVIRONMENT,
        "launcher/train.py": TRAIN,
        "launcher/smollm2.py": "",
        "bin/deepspeed": DEEPSPEED.format(python=sys.executable),
        "bin/dynrank": EXPORTED,
        "bin/python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "q/data/gsm_symbolic_unseen.jsonl": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for name in ("quickstart.sh", "stop_training.py"):
        shutil.copy(ROOT / "launcher" / name, tmp_path / "launcher" / name)
    return tmp_path


def descendant(process: psutil.Process, word: str) -> psutil.Process:
    """The first process below `process` with a word of its command that ends in `word`."""
    return next(p for p in process.children(recursive=True) if any(w.endswith(word) for w in p.cmdline()))


def stopped(
    root: Path,
    output: Path,
    receiver: Callable[[psutil.Process], psutil.Process],
    steps: int,
    number: signal.Signals = signal.SIGTERM,
) -> str:
    """What the quickstart says that gets a signal while it trains, `steps` done; all its processes are gone."""
    state, metrics, log = output / "run/state.json", output / "run/metrics.jsonl", output.parent / "log"
    with log.open("w") as file:
        script = psutil.Popen(
            ["bash", "launcher/quickstart.sh", "--short", "--output", str(output)],
            cwd=root,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Where the tests run in a shell's background it is ignored, and bash cannot trap what it finds ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 400
        while not (
            state.is_file()
            and '"running"' in state.read_text()
            and metrics.is_file()
            and len(metrics.read_text().splitlines()) >= steps
        ):
            assert script.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        family = script.children(recursive=True)
        receiver(script).send_signal(number)
        assert script.wait(200) == 75, log.read_text()[-3000:]
        assert not psutil.wait_procs(family, 5)[1]
    finally:
        for member in [script, *family]:
            if member.is_running():
                member.kill()
    said = log.read_text()
    assert "was stopped before its end and has saved; the same command resumes it" in said
    assert "== export" not in said
    return said


@pytest.mark.parametrize(
    ("receiver", "number"),
    [
        (lambda script: script, signal.SIGTERM),
        (lambda script: script, signal.SIGINT),
        (lambda script: descendant(script, "bin/deepspeed"), signal.SIGTERM),
        (lambda script: descendant(script, "launcher/train.py"), signal.SIGTERM),
    ],
    ids=["script, TERM", "script, INT", "launcher, TERM", "training, TERM"],
)
def test_it_stops_whoever_receives_the_signal(
    receiver: Callable[[psutil.Process], psutil.Process], number: signal.Signals, stand_in: Path
) -> None:
    stopped(stand_in, stand_in / "q", receiver, 1, number)


def test_it_goes_on_where_training_has_ended(stand_in: Path) -> None:
    (stand_in / "q/run/adapter").mkdir(parents=True)
    ran = subprocess.run(
        ["bash", "launcher/quickstart.sh", "--short", "--output", "q"],
        cwd=stand_in,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "== export" in ran.stdout and "exported" in ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv/.dynrank-stamp").is_file()
    or not (ROOT / ".cache/smollm2-135m-instruct/conversion.json").is_file(),
    reason="needs what the quickstart installs: bash launcher/quickstart.sh --short",
)
def test_the_same_command_resumes_it_each_time(tmp_path: Path) -> None:
    output = tmp_path / "q"
    receivers = [
        lambda script: script,
        lambda script: descendant(script, "bin/deepspeed"),
        lambda script: descendant(script, "deepspeed.launcher.launch"),
    ]
    for number, receiver in enumerate(receivers, start=1):
        stopped(ROOT, output, receiver, steps=number)
        assert not (output / "adapter").exists()
        state = json.loads((output / "run/state.json").read_text())
        assert (state["state"], state["total_steps"]) == ("stopped", 6) and number <= state["step"] < 6
