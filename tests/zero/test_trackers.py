"""Experiment trackers get what the logs have, and a resumed run goes on in them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrank_ds.cli import main
from tests.support.launch import train
from tests.support.recipes import lines, write_recipe

STEPS = 8
OPTIONS = (f"train.steps={STEPS}", "train.checkpoint_interval=5", "output.report_to=[tensorboard,wandb]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained to its end, which is lost, and again from step 5 on."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")
    recipe, run = write_recipe(folder), folder / "run"
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    train(2, recipe, *OPTIONS)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS}")
    shutil.rmtree(run / "adapter")
    train(2, recipe, *OPTIONS, "resume=auto")
    patch.undo()
    return run


def test_tensorboard_has_every_step_once_with_the_values_of_the_log(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = lines(run / "metrics.jsonl")
    for name in ("loss", "learning_rate", "tokens_per_second", "memory_gib", "total_rank_stored"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == list(range(1, STEPS + 1)), name
        assert [value for _, value in found] == pytest.approx([line[name] for line in logged], rel=1e-6)
    adjustments = lines(run / "ranks.jsonl")
    assert [event.step for event in events.Scalars("mean_rank/all")] == [line["step"] for line in adjustments]
    ranks = [r for m, r in adjustments[-1]["after"].items() if m.endswith("q_proj")]
    assert events.Scalars("mean_rank/self_attn.q_proj")[-1].value == pytest.approx(sum(ranks) / len(ranks))
    assert events.Images("ranks")[-1].encoded_image_string.startswith(b"\x89PNG")
    assert "global_batch_size: 6" in str(events.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0])


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for a record's head: the block ends in zeros
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_continues_the_same_run_offline(run: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    name = (run / "wandb_id").read_text()
    files = sorted((run / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(files) == 2
    steps: list[list[int]] = []
    for file in files:
        found: list[int] = []
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item
                }
                if "loss" in items:
                    found.append(int(json.loads(items["_step"].value_json)))
        steps.append(found)
    assert steps[0] == list(range(1, STEPS + 1))
    assert steps[1] == list(range(6, STEPS + 1))


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["validate", "--recipe", str(recipe), "output.report_to=[wandb]"]) == 2
    assert (
        "output.report_to names wandb, which is not installed: pip install wandb" in capsys.readouterr().err
    )
