"""A real SLURM of two nodes on this machine, in a folder of its own: for root, with Debian's slurm-wlm and munge."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.launch import free_port

_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n0", "n1")

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no SLURM here; None where there can."""
    absent = [name for name in _DAEMONS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Two idle nodes; SLURM_CONF names their configuration."""
    for name in ("state", "spool", "log"):
        (folder / name).mkdir(parents=True)
    configuration = folder / "slurm.conf"
    ports = [free_port() for _ in range(3)]
    configuration.write_text(_CONFIGURATION.format(host=socket.gethostname(), ports=ports, folder=folder))
    os.environ["SLURM_CONF"] = str(configuration)
    started_munge = _start_munge()
    try:
        subprocess.run(["slurmctld"], check=True)
        for node in NODES:
            start_node(node)
        wait_until(lambda: command("sinfo", "-h", "-o", "%D %t") == "2 idle", 60)
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], check=False)
        for file in [*folder.glob("slurmd-*.pid"), folder / "slurmctld.pid"]:
            _terminate(file)
        if started_munge:
            _terminate(Path("/run/munge/munged.pid"))
        del os.environ["SLURM_CONF"]


def start_node(name: str) -> None:
    """Starts the daemon of a node."""
    subprocess.run(["slurmd", "-N", name], check=True)


def stop_node(folder: Path, name: str) -> None:
    """Ends the daemon of a node, and tells the controller so: it would notice minutes later."""
    _terminate(folder / f"slurmd-{name}.pid")
    command("scontrol", "update", f"nodename={name}", "state=down", "reason=test")


def _start_munge() -> bool:
    """Whether munged had to be started."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return False
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    return True


def _terminate(file: Path) -> None:
    if file.is_file():
        subprocess.run(["kill", file.read_text().strip()], check=False)


def command(*words: str) -> str:
    """What a command of SLURM's prints."""
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def state_of(job: str) -> str:
    """PENDING, RUNNING, COMPLETED, ..."""
    return next(
        (
            word.removeprefix("JobState=")
            for word in command("scontrol", "show", "job", job).split()
            if word.startswith("JobState=")
        ),
        "UNKNOWN",
    )


def wait_for_end(job: str, seconds: float, about: Callable[[], str]) -> None:
    """Waits until a job that may be requeued is complete, and spares it most of its two minutes."""

    def ended() -> bool:
        state = state_of(job)
        if state == "PENDING":
            start_now(job)
        return state == "COMPLETED"

    wait_until(ended, seconds, about)


def start_now(job: str) -> None:
    """Waits until a requeued job is pending, and spares it most of its two minutes."""
    wait_until(lambda: state_of(job) == "PENDING", 120, lambda: command("scontrol", "show", "job", job))
    time.sleep(5)  # started in the second of its end, a job is taken for the one that was killed
    command("scontrol", "update", f"jobid={job}", "starttime=now")
    wait_until(lambda: state_of(job) != "PENDING", 150, lambda: command("scontrol", "show", "job", job))


def wait_until(condition: Callable[[], object], seconds: float, about: Callable[[], str] = str) -> None:
    """about: what to show where the time was not enough."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {about()}"
        time.sleep(0.2)
