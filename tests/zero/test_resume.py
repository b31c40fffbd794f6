"""A run that is stopped and resumed is the run that was not stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dynrank_ds.data.collating import PaddedCollator
from dynrank_ds.recipe import load_recipe
from dynrank_ds.training.samples import make_batches, prepare_data
from tests.support.launch import (
    reported_errors,
    run_worker,
    start_processes,
    train,
    train_command,
    wait,
    wait_until,
)
from tests.support.recipes import STEPS, lines, write_recipe

EVERY_TEN = "train.checkpoint_interval=10"


@pytest.fixture(scope="module", params=[2, 1], ids=["same world size", "other world size"])
def resumed(request: pytest.FixtureRequest, uninterrupted: Path) -> tuple[int, Path]:
    """The world size, and the run as resumed from step 10, since its checkpoint of step 20 is damaged."""
    run = uninterrupted / f"resumed{request.param}"
    shutil.copytree(uninterrupted / "run", run)
    damaged = run / "checkpoints" / f"step-{STEPS}" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.rmtree(run / "adapter")
    recipe = uninterrupted / "recipe.yaml"
    first, *_ = train(request.param, recipe, EVERY_TEN, f"output.dir={run}", "resume=auto")
    assert f"step-{STEPS} is damaged: state.safetensors differs" in first.output
    assert (run / "checkpoints" / f"step-{STEPS}.damaged").is_dir()
    return request.param, run


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run / "metrics.jsonl")]


def plans(run: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["plan_sha256"]) for line in lines(run / "ranks.jsonl")]


def test_losses_are_those_of_the_uninterrupted_run(resumed: tuple[int, Path], uninterrupted: Path) -> None:
    world_size, run = resumed
    expected, actual = losses(uninterrupted / "run"), losses(run)
    if world_size == 2:
        assert actual == expected
    else:
        assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) <= 1e-6


def test_plans_are_those_of_the_uninterrupted_run(resumed: tuple[int, Path], uninterrupted: Path) -> None:
    assert plans(resumed[1]) == plans(uninterrupted / "run")
    assert [step for step, _ in plans(resumed[1])] == [4, 7, 10, 13, 16]


def test_each_step_is_logged_once(resumed: tuple[int, Path]) -> None:
    logged = lines(resumed[1] / "metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))


def test_another_run_than_the_checkpoints_is_refused_in_one_sentence(uninterrupted: Path) -> None:
    message = refused(uninterrupted, "run", "train.learning_rate=1e-4", "train.micro_batch_size=3")
    assert "train.learning_rate is 0.0001, was 0.005. Set these back" in message


def refused(uninterrupted: Path, name: str, *overrides: str) -> str:
    """The refusal of a resume, which changes no file."""
    run = uninterrupted / name
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    options = (*overrides, f"output.dir={run}", "resume=auto")
    processes = start_processes(
        2, train_command(uninterrupted / "recipe.yaml", *options), uninterrupted / "logs"
    )
    wait(processes)
    assert [process.returncode for process in processes] == [2, 2]
    [message] = reported_errors(processes)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    return message


def test_a_run_without_a_checkpoint_is_restarted_by_its_own_recipe_and_model_only(
    uninterrupted: Path,
) -> None:
    run = uninterrupted / "unsaved"
    shutil.copytree(uninterrupted / "run", run)
    shutil.rmtree(run / "checkpoints")
    assert "holds the adapter of a run but no checkpoint" in refused(uninterrupted, "unsaved")
    shutil.rmtree(run / "adapter")
    message = refused(uninterrupted, "unsaved", "train.seed=1")
    assert f"{run} cannot be resumed" in message and "train.seed is 1, was 0" in message
    environment = json.loads((run / "environment.json").read_text())
    environment["identity"]["base model"] = "another's"
    (run / "environment.json").write_text(json.dumps(environment))
    assert "the base model is a different one" in refused(uninterrupted, "unsaved")


def test_a_run_keeps_others_out_of_its_directory_until_it_ends(uninterrupted: Path) -> None:
    run = uninterrupted / "busy"
    options = (EVERY_TEN, f"output.dir={run}", "resume=auto")
    command = train_command(uninterrupted / "recipe.yaml", *options)
    first = start_processes(1, command, uninterrupted / "logs")
    wait_until(lambda: (run / "metrics.jsonl").is_file(), first)
    os.kill(first[0].pid, signal.SIGSTOP)
    second = start_processes(2, command, uninterrupted / "logs")
    wait(second)
    os.kill(first[0].pid, signal.SIGCONT)
    assert [process.returncode for process in second] == [2, 2]
    [message] = reported_errors(second)
    assert f"output.dir {run} is in use by another run" in message
    wait(first)
    assert first[0].returncode == 0, first[0].output
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_a_longer_run_is_the_same_as_a_finished_one_made_longer(uninterrupted: Path) -> None:
    recipe, fixed = uninterrupted / "recipe.yaml", ("method.name=lora", "train.schedule=constant")
    long, extended = uninterrupted / "long", uninterrupted / "extended"
    train(2, recipe, *fixed, f"output.dir={long}", "train.steps=12")
    train(2, recipe, *fixed, f"output.dir={extended}", "train.steps=8")
    train(2, recipe, *fixed, f"output.dir={extended}", "train.steps=12", "resume=auto")
    assert losses(extended) == losses(long)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((long / "adapter" / n).read_bytes() == (extended / "adapter" / n).read_bytes() for n in names)


def test_a_finished_run_that_is_resumed_keeps_its_last_checkpoint(uninterrupted: Path) -> None:
    run = uninterrupted / "finished"
    shutil.copytree(uninterrupted / "run", run)
    shutil.rmtree(run / "adapter")
    last = run / "checkpoints" / f"step-{STEPS}"
    before = last.stat().st_ino
    train(2, uninterrupted / "recipe.yaml", EVERY_TEN, f"output.dir={run}", "resume=auto")
    assert last.stat().st_ino == before and not [*run.rglob("*.tmp")]
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (uninterrupted / "run" / weights).read_bytes()


SETUPS = [
    "deepspeed.config=zero3",
    "deepspeed.config=zero2",
    "model.dtype=bf16,deepspeed.config=zero3_offload",
]


@pytest.fixture(scope="module")
def discarding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("discarding")
    write_recipe(folder)
    run_worker(2, "discarding", folder, *SETUPS)
    return folder


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_that_discarded_batches_continues_with_the_batch_it_would_have_had(
    discarding: Path, setup: str
) -> None:
    whole, resumed = discarding / setup / "whole", discarding / setup / "resumed"
    logged = [
        [(x["step"], x["batch"], x["discarded"], x["loss"]) for x in lines(run / "metrics.jsonl")]
        for run in (whole, resumed)
    ]
    assert logged[0] == logged[1]
    assert [batch for _, batch, was, _ in logged[0] if was] == [4, 8]  # counted once they are done
    assert plans(whole) == plans(resumed)
    weights = "adapter/adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_signal_to_one_process_saves_and_ends_all_and_the_run_can_go_on(uninterrupted: Path) -> None:
    run = uninterrupted / "stopped"
    command = train_command(uninterrupted / "recipe.yaml", EVERY_TEN, f"output.dir={run}", "resume=auto")
    processes = start_processes(2, command, uninterrupted / "logs")
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and len(lines(metrics)) >= 2, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    wait(processes)
    outputs = [process.output for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    messages = [line for output in outputs for line in output.splitlines() if "resume=auto" in line]
    assert len(messages) == 1, outputs
    stopped_at = int(re.search(r"stopped at step (\d+)", messages[0])[1])  # type: ignore[index]
    assert 2 <= stopped_at < STEPS
    assert (run / "checkpoints" / f"step-{stopped_at}" / "state.json").is_file()
    assert len(losses(run)) == stopped_at and not (run / "adapter").exists()
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"], state["total_steps"]) == ("stopped", stopped_at, STEPS)
    assert state["how_to_continue"] == "resume with the same command and resume=auto"

    train(2, uninterrupted / "recipe.yaml", EVERY_TEN, f"output.dir={run}", "resume=auto")
    assert losses(run) == losses(uninterrupted / "run")
    assert plans(run) == plans(uninterrupted / "run")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"]) == ("finished", STEPS)


def test_each_process_has_the_batches_of_the_uninterrupted_run(uninterrupted: Path) -> None:
    run, whole, recipe = (
        uninterrupted / "batches",
        uninterrupted / "batches-whole",
        uninterrupted / "recipe.yaml",
    )
    shutil.copytree(uninterrupted / "run", run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS}")
    for folder in (run, whole):
        train(2, recipe, EVERY_TEN, f"output.dir={folder}", "output.log_batches=true", "resume=auto")
    before, after = lines(run / "metrics.jsonl")[:10], lines(run / "metrics.jsonl")[10:]
    assert not any("batch_sha256" in line for line in before)
    digests = [line["batch_sha256"] for line in after]
    logged = [line["batch_sha256"] for line in lines(whole / "metrics.jsonl")]
    assert digests == logged[10:] and losses(run) == losses(whole)
    assert len({digest for both in logged for digest in both}) == 2 * STEPS  # no two alike
    assert logged[12] == [_digest_of_batch(uninterrupted, 12, process) for process in range(2)]


def _digest_of_batch(folder: Path, batch: int, process: int) -> str:
    """Of the only micro-batch that a process of two should have: every second sample of a global batch."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    samples, pad_id = prepare_data(recipe)
    chosen = make_batches(samples, recipe).indices(batch)
    [rows] = PaddedCollator(pad_id).micro_batches(chosen, samples.lengths, process, 2, 3)
    assert len(rows) == 3 < len(chosen)
    ids = torch.full((3, int(samples.lengths[rows].max())), pad_id)
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    for row, index in enumerate(rows):
        length = int(samples.lengths[index])
        of_sample = slice(int(samples.starts[index]), int(samples.starts[index]) + length)
        ids[row, :length] = torch.tensor(samples.tokens[of_sample].astype("int64"))
        is_target[row, :length] = torch.tensor(samples.targets[of_sample].astype(bool))
    positions = is_target.flatten().nonzero().flatten() - 1
    digest = hashlib.sha256()
    for name, value in (("input_ids", ids), ("positions", positions), ("targets", ids[is_target])):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode() + value.numpy().tobytes())
    return digest.hexdigest()[:15]
