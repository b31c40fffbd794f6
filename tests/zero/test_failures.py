"""Trouble in one of two processes is trouble, or none, for both alike."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.launch import outcomes, start_processes, train_command, wait
from tests.support.recipes import STEPS, lines, write_recipe


def test_processes_with_different_plans_all_fail_before_anything_changes(shards: Path) -> None:
    run = shards / "disagreement"
    for message in outcomes(run, "failure", 2):
        assert message.startswith("processes disagree on the rank plan of step 4")
    assert outcomes(run, "changed", 2) == [[], []]
    assert not (run / "ranks.jsonl").exists()


def test_processes_that_see_different_checkpoints_are_asked_to_share_a_disk(shards: Path) -> None:
    for message in outcomes(shards, "unshared", 2):
        assert message.startswith("the processes see different checkpoints in ")
        assert message.endswith("output.dir must be on a disk that all of them share")


def test_processes_that_hold_different_data_are_reported_before_anything_is_made(shards: Path) -> None:
    for message in outcomes(shards, "differing", 2):
        assert re.match(
            "the processes are not alike: tokenised data is .* in process 1 on .* in process 0", message
        )
    assert not (shards / "differing").exists()


def test_nodes_with_other_code_packages_or_recipe_are_named_with_what_differs(shards: Path) -> None:
    for message in outcomes(shards, "unlike", 2):
        assert message.startswith(
            "the processes are not alike: code of dynrank_ds is bbbbbbbbbbbb in process 1 on node1"
        )
        assert "torch is 2.12.0 in process 1 on node1, 2.13.0 in process 0 on node0" in message
        assert re.search("recipe is [0-9a-f]{12} in process 1 on node1", message) and "peft" not in message
        assert message.endswith("They must be the same on every node")
    assert not (shards / "unlike").exists()


def test_a_run_whose_ranks_never_changed_ends_with_a_warning(shards: Path) -> None:
    first, second = outcomes(shards / "unchanged", "warnings", 2)
    assert second == []
    assert "ranks never changed although pe_dyra planned 5 adjustments" in first


def test_a_run_that_only_replaces_triples_warns_at_the_first_adjustment_and_at_the_end(shards: Path) -> None:
    first, second = outcomes(shards / "replaced", "warnings", 2)
    assert second == []
    [warning] = [line for line in first if line.startswith("adjustment at step 4 replaced 5 of 56 triples")]
    assert "changed no rank" in warning and "raise adapter.max_rank" in warning
    assert "ranks never changed although pe_dyra planned 5 adjustments" in first


@pytest.fixture(scope="module", params=["pe_dyra", "weightlora", "dynamic_dora"])
def run(request: pytest.FixtureRequest, shards: Path) -> Path:
    """A run in which two global batches met a NaN."""
    return shards / f"nan-{request.param}"


@pytest.fixture(scope="module")
def steps(run: Path) -> list[list[dict[str, Any]]]:
    """Each process's steps."""
    return outcomes(run, "steps", 2)


def test_a_nan_on_one_process_discards_the_step_on_all(steps: Any) -> None:
    for batch, holder in ((5, 0), (9, 1)):
        finite = [process[batch]["finite_here"] for process in steps]
        assert finite == [holder != 0, holder != 1]  # only its shard ever held the NaN
        assert [process[batch]["applied"] for process in steps] == [False, False]


def test_a_discarded_step_changes_no_bit_of_weights_moments_ages_and_statistics(steps: Any) -> None:
    for process in steps:
        assert [process[batch]["changed"] for batch in (5, 9)] == [[], []]


def test_training_continues_after_a_discarded_step(steps: Any, run: Path) -> None:
    for process in steps:
        assert len(process) == STEPS + 2 and process[-1]["step"] == STEPS
        assert all(step["finite"] for step in process)
        for batch, statistic in ((6, {"statistic"}), (10, set())):  # WeightLoRA's w is fixed by then
            assert process[batch]["applied"]
            kinds = {name.split()[0] for name in process[batch]["changed"]}
            assert {"master", "half", "exp_avg", "exp_avg_sq", "optimizer"} | statistic <= kinds
    discarded = [line["discarded"] for line in lines(run / "metrics.jsonl")]
    assert [batch for batch, was in enumerate(discarded) if was] == [5, 9]


def test_a_run_whose_steps_are_all_discarded_ends_with_the_samples_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, dtype="bf16")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    processes = start_processes(2, train_command(recipe), tmp_path / "logs")
    wait(processes)
    assert [process.returncode for process in processes] == [2, 2]
    first, second = (process.output for process in processes)
    assert len(re.findall(r"step 1 discarded: .* on samples \[(?:\d+, ){5}\d+\]", first)) == 10
    assert "error: 10 steps in a row were discarded" in first
    assert "Traceback" not in first + second and "discarded" not in second
    assert not (tmp_path / "run").exists()  # no step was applied: the same recipe can be started again


def test_a_port_that_is_in_use_is_named_at_once_with_the_option_that_changes_it(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        [process] = start_processes(1, train_command(write_recipe(tmp_path)), tmp_path / "logs", port=port)
        wait([process], timeout=120)
    assert process.returncode == 2
    assert f"error: port {port} of 127.0.0.1 is in use" in process.output
    assert "--master_port" in process.output and "MASTER_PORT" in process.output
    assert not (tmp_path / "run").exists()
