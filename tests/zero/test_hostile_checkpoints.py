"""A checkpoint that somebody made to do harm, sums included, is refused in one sentence, and nothing in it runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynrank_ds.checkpoint.content import check_content
from dynrank_ds.checkpoint.files import newest_undamaged, read_state, write_sums
from dynrank_ds.errors import DynrankError
from tests.support.launch import reported_errors, start_processes, train_command, wait
from tests.support.recipes import STEPS

NEWEST = f"step-{STEPS}"
MODULE = "model.layers.0.self_attn.q_proj"


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def run(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a finished run; `edited` writes the sums anew."""
    return shutil.copytree(uninterrupted / "run", tmp_path / "run")


def content(run: Path) -> None:
    """Read the newest checkpoint as a resumed run does, before it makes anything of it."""
    path = newest_undamaged(run)
    assert path is not None and path.name == NEWEST
    check_content(path, read_state(path))


def test_what_a_run_wrote_is_accepted(run: Path) -> None:
    content(run)


def put(state: dict[str, Any], *keys: str, value: Any) -> dict[str, Any]:
    """The state with one value replaced, under keys from outside to inside."""
    *outer, last = keys
    place = state
    for key in outer:
        place = place[key]
    place[last] = value
    return state


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda s: [s], "holds list, not an object"),
    "a step of text": (lambda s: put(s, "step", value="20"), "step: Input should be a valid integer"),
    "another step": (lambda s: put(s, "step", value=10**9), "step is 1000000000"),
    "a step below 0": (lambda s: put(s, "step", value=-20), "step: Input should be greater"),
    "modules in a list": (lambda s: put(s, "blocks", value=[]), "blocks: Input should be a valid dictionary"),
    "a rank of NaN": (lambda s: put(s, "blocks", MODULE, "rank", value=float("nan")), "rank: Input"),
    "an endless scale": (lambda s: put(s, "blocks", MODULE, "scale", value=float("inf")), "finite number"),
    "a huge rank": (lambda s: put(s, "blocks", MODULE, "rank", value=2**40), "numbers of births"),
    "a gate of text": (lambda s: put(s, "blocks", MODULE, "gate", value="os.system"), "gate: Input should"),
    "a recipe of text": (lambda s: put(s, "recipe", "train", value="!!python"), "recipe.train: Input should"),
    "a name with a path": (
        lambda s: put(s, "blocks", "../../../etc/passwd", value=s["blocks"].pop(MODULE)),
        "which is of no module of state.json",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_no_run_writes_is_refused(name: str, run: Path) -> None:
    change, sentence = STATES[name]
    path = run / "checkpoints" / NEWEST / "state.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    write_sums(path.parent)
    with pytest.raises(DynrankError, match=sentence.replace("(", r"\(")):
        content(run)


def test_a_state_nested_without_end_is_refused(run: Path) -> None:
    path = run / "checkpoints" / NEWEST / "state.json"
    path.write_text("[" * 200_000)
    write_sums(path.parent)
    with pytest.raises(DynrankError, match="is no JSON"):
        content(run)


Tensors = dict[str, torch.Tensor]
KEY = f"master/{MODULE}.lora_A"
TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "NaN in a weight": (lambda t: t | {KEY: torch.full_like(t[KEY], torch.nan)}, "not finite"),
    "an infinite moment": (
        lambda t: (
            t | {k: torch.full_like(v, torch.inf) for k, v in t.items() if k == f"exp_avg_sq/{MODULE}.lora_B"}
        ),
        "exp_avg_sq/.* has values that are not finite",
    ),
    "another shape": (lambda t: t | {KEY: torch.zeros(1, 1)}, r"lora_A is torch.float32 \(1, 1\)"),
    "another dtype": (lambda t: t | {KEY: t[KEY].half()}, "lora_A is torch.float16"),
    "a tensor too many": (lambda t: t | {"master/../../x.lora_A": torch.zeros(2)}, "which is of no module"),
    "a tensor too few": (lambda t: {k: v for k, v in t.items() if k != KEY}, f"lacks {KEY}"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_no_run_writes_are_refused(name: str, run: Path) -> None:
    change, sentence = TENSORS[name]
    path = run / "checkpoints" / NEWEST / "state.safetensors"
    save_file(change(load_file(path)), path)
    write_sums(path.parent)
    with pytest.raises(DynrankError, match=sentence):
        content(run)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


HEADERS = {
    "a length of 2^63": (2**63).to_bytes(8, "little"),
    "a length of 99 MB in a file of 8 bytes": (99_000_000).to_bytes(8, "little"),
    "nesting without end": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a shape of 2^80 elements": header(x={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}),
    "a shape below 0": header(x={"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}) + b"0000",
    "bytes before the file": header(x={"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}),
    "places that are no whole numbers": header(x={"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]})
    + b"0000",
    "an unknown dtype": header(x={"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}) + b"0000",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_tensor_file_with_a_hostile_header_is_refused(name: str, run: Path) -> None:
    path = run / "checkpoints" / NEWEST / "state.safetensors"
    path.write_bytes(HEADERS[name])
    write_sums(path.parent)
    with pytest.raises(DynrankError, match="is not a readable safetensors file"):
        content(run)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "SHA256SUMS"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_not_read(name: str, run: Path) -> None:
    path = run / "checkpoints" / NEWEST / name
    for make in (os.mkfifo, lambda p: os.symlink("/dev/zero", p)):
        path.unlink()
        make(path)
        assert newest_undamaged(run) == run / "checkpoints/step-10"


def without_statistics(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("statistics/")}


def with_short_statistics(tensors: Tensors) -> Tensors:
    return {name: t[:1] if name.startswith("statistics/") else t for name, t in tensors.items()}


HARMS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "NaN": (TENSORS["NaN in a weight"][0], "values that are not finite"),
    "no statistics": (without_statistics, "has no tensor statistics/input_energy/"),
    "short statistics": (with_short_statistics, r"has shape \(1,\); the method needs"),
}


def files_but_state(run: Path) -> dict[Path, int]:
    """When each file was written; state.json says that the run loads before statistics are looked at."""
    return {file: file.stat().st_mtime_ns for file in run.rglob("*") if file != run / "state.json"}


@pytest.mark.parametrize("harm", ["pickle", *HARMS])
def test_a_run_that_would_resume_from_it_ends_with_the_sentence_and_changes_no_file(
    harm: str, run: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    path, made = run / "checkpoints" / NEWEST / "state.safetensors", tmp_path / "made"
    if harm == "pickle":
        path.write_bytes(pickle.dumps(Payload(made)))
    else:
        save_file(HARMS[harm][0](load_file(path)), path)
    write_sums(path.parent)
    before = files_but_state(run)
    command = train_command(uninterrupted / "recipe.yaml", f"output.dir={run}", "resume=auto")
    processes = start_processes(2, [*command, "train.checkpoint_interval=10"], tmp_path / "logs")
    wait(processes)
    assert [process.returncode for process in processes] == [2, 2], [p.output for p in processes]
    [message] = reported_errors(processes)
    assert re.search("is not a readable safetensors file" if harm == "pickle" else HARMS[harm][1], message)
    assert "Traceback" not in processes[0].output + processes[1].output
    assert before == files_but_state(run) and not made.exists()
