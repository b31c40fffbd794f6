"""Runs on two hosts that share a disk and one cable: torchrun, `deepspeed --hostfile`, and the cable pulled out."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.hosts import ADDRESSES, INTERFACE, Hosts, missing, start_ssh_servers, two_hosts
from tests.support.launch import ROOT, train
from tests.support.recipes import STEPS, lines, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

# Of four processes; adjustments are at steps 4, 7, 10, 13 and 16.
OPTIONS = ("train.global_batch_size=12", "train.checkpoint_interval=4")
TIMEOUT = 10
VARIABLES = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": INTERFACE,
}


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and the run of it in four processes on one host."""
    folder = tmp_path_factory.mktemp("hosts")
    train(4, write_recipe(folder), *OPTIONS, f"output.dir={folder / 'one-host'}")
    return folder


def arguments(folder: Path, run: Path) -> list[str]:
    """The training command's."""
    recipe = ["--recipe", str(folder / "recipe.yaml"), f"output.dir={run}", "resume=auto"]
    return [*recipe, *OPTIONS, f"deepspeed.timeout={TIMEOUT}"]


def torchrun(hosts: Hosts, script: list[str], run: Path, **variables: str) -> list[psutil.Popen]:
    """Start two processes on each host."""
    base = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    base += ["--master_addr", ADDRESSES[0], "--master_port", "29500"]
    return [
        hosts.start(
            host, [*base, "--node_rank", str(host), *script], log(run, host), {**VARIABLES, **variables}
        )
        for host in (0, 1)
    ]


def log(run: Path, host: int) -> Path:
    return run.with_name(f"{run.name}-{host}.log")


def logs(run: Path) -> str:
    return "\n".join(f"== host {host}\n{log(run, host).read_text()[-6000:]}" for host in (0, 1))


def losses(run: Path) -> list[Any]:
    return [(line["step"], line["loss"]) for line in lines(run / "metrics.jsonl")]


def plans(run: Path) -> list[str]:
    return [line["plan_sha256"] for line in lines(run / "ranks.jsonl")]


def assert_same_bits(run: Path, folder: Path) -> None:
    whole = folder / "one-host"
    assert losses(run) == losses(whole) and plans(run) == plans(whole)
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def wait_until(condition: Callable[[], object], processes: list[psutil.Popen], run: Path) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert all(process.poll() is None for process in processes), logs(run)
        assert time.monotonic() < deadline, logs(run)
        time.sleep(0.1)


def wait(processes: list[psutil.Popen], seconds: float, run: Path) -> list[int]:
    """The exit codes."""
    try:
        return [process.wait(seconds) for process in processes]
    except psutil.TimeoutExpired:
        pytest.fail(f"it ran for more than {seconds} s: {logs(run)}")


@pytest.mark.parametrize(
    ("point", "step"),
    [("in a forward", 6), ("with changed modules gathered", 7), ("with one tensor written", 8)],
    ids=["in a step", "in an adjustment", "while a checkpoint is written"],
)
def test_a_cable_that_is_pulled_out_ends_both_sides_which_name_the_other_and_the_run_goes_on(
    point: str, step: int, hosts: Hosts, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    waits = ["-m", "tests.zero.workers.killed", point, str(step), "0", *arguments(folder, run)]
    processes = torchrun(hosts, waits, run, DYNRANK_TEST_WAIT=str(tmp_path), PYTHONPATH=str(ROOT))
    wait_until((tmp_path / "reached").exists, processes, run)
    hosts.set_cable("down")
    began = time.monotonic()
    (tmp_path / "go").touch()
    assert wait(processes, TIMEOUT + 20, run) == [1, 1]
    print("ended after", time.monotonic() - began)
    # It is written once when it is known, and again below the launcher's own lines.
    here, there = (
        {x for x in log(run, h).read_text().splitlines() if x.startswith("error: ")} for h in (0, 1)
    )
    assert len(here) == len(there) == 1, logs(run)
    assert "processes 2, 3 died or hung, or the network is cut" in here.pop()
    assert f"process 0 died or hung, or the network to its node ({ADDRESSES[0]}) is cut" in there.pop()
    assert json.loads((run / "state.json").read_text())["state"] == "failed"

    hosts.set_cable("up")
    processes = torchrun(hosts, [str(ROOT / "launcher/train.py"), *arguments(folder, run)], run)
    assert wait(processes, 300, run) == [0, 0], logs(run)
    assert "resumed from" in log(run, 0).read_text()
    assert_same_bits(run, folder)


@pytest.mark.skipif(
    shutil.which("pdsh") is None, reason="pdsh not found: apt-get install pdsh openssh-server"
)
def test_deepspeed_with_a_hostfile_trains_as_one_host_does(
    hosts: Hosts, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    variables = start_ssh_servers(hosts, tmp_path)
    (tmp_path / "hosts").write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    kept = {**VARIABLES, "DYNRANK_CACHE": os.environ["DYNRANK_CACHE"]}
    (tmp_path / "environment").write_text("".join(f"{name}={value}\n" for name, value in kept.items()))
    variables |= {"DS_ENV_FILE": str(tmp_path / "environment"), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts")]
    command += ["--no_ssh_check", "--master_addr", ADDRESSES[0], "--master_port", "29500"]
    command += [str(ROOT / "launcher/train.py"), *arguments(folder, run)]
    launcher = hosts.start(0, command, log(run, 0), variables)
    log(run, 1).touch()
    assert wait([launcher], 300, run) == [0]
    assert_same_bits(run, folder)


def test_an_elastic_torchrun_goes_on_with_the_host_that_is_left(
    hosts: Hosts, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    waits = ["-m", "tests.zero.workers.killed", "in a forward", "10", "0", *arguments(folder, run)]
    base = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "2"]
    base += ["--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    base += ["--rdzv_endpoint", f"{ADDRESSES[0]}:29500"]
    variables = {**VARIABLES, "DYNRANK_TEST_WAIT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    processes = []
    for host in (0, 1):
        conf = f"is_host={1 - host},last_call_timeout=5"
        command = [*base, "--local_addr", ADDRESSES[host], "--rdzv_conf", conf, *waits]
        processes.append(hosts.start(host, command, log(run, host), variables))
    wait_until((tmp_path / "reached").exists, processes, run)
    hosts.kill(1)
    (tmp_path / "go").touch()
    assert wait(processes[:1], 300, run) == [0], logs(run)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert "resumed from" in log(run, 0).read_text()
    whole = folder / "one-host"
    difference = max(abs(a - b) for (_, a), (_, b) in zip(losses(run), losses(whole), strict=True))
    print("largest difference of losses", difference)
    assert difference <= 1e-6 and plans(run) == plans(whole) and len(losses(run)) == STEPS
