"""Environments of their own for packages that do not fit into ours, kept in a cache folder between runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# What pip and its libraries say where no index answers.
_UNREACHABLE = ("NewConnectionError", "Temporary failure in name resolution", "Name or service not known")
_UNREACHABLE += ("Max retries exceeded", "ConnectTimeoutError", "ProxyError", "Network is unreachable")


def environment(name: str, requirements: Sequence[str], remove: Sequence[str] = ()) -> Path:
    """Return the interpreter of a virtual environment with just these packages and what they need.

    It is made once, in dynrank_ds/test-environments of the user's cache folder; the test is skipped where no package
    index can be reached.

    remove: packages to uninstall afterwards.
    """
    wanted = json.dumps([sys.version_info[:2], list(requirements), list(remove)])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = (
        cache
        / "dynrank_ds"
        / "test-environments"
        / f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    )
    python = place / "bin" / "python"
    if (place / "complete").exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip(python, "install", "--quiet", "--no-cache-dir", *requirements)
    if remove:
        pip(python, "uninstall", "--quiet", "--yes", *remove)
    (place / "complete").touch()
    return python


def pip(python: Path, *arguments: str) -> None:
    """Run an environment's pip; skip the test where no package index can be reached."""
    done = subprocess.run([str(python), "-m", "pip", *arguments], capture_output=True, text=True)
    if any(sign in done.stderr for sign in _UNREACHABLE):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]


def ask(python: Path, script: Path, question: Any, settings: Mapping[str, str] | None = None) -> Any:
    """Return what `script` answers to `question`, both as JSON, in the environment of `python`."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "question.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(question))
        done = subprocess.run(
            [str(python), "-I", str(script), str(asked), str(answered)],
            env={**clean, "HF_HUB_OFFLINE": "1", "HF_HOME": folder, **(settings or {})},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(answered.read_text())
