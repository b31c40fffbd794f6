"""Two hosts on this machine: network namespaces with one cable between them, for root, with Debian's iproute2.

Nothing leads out of them: what they send stays on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

INTERFACE = "eth7"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str | None:
    """Why there can be no second host here; None where there can."""
    if shutil.which("ip") is None:
        return "ip not found: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"dynrank-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return None


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Two namespaces; hosts 0 and 1 see each other under ADDRESSES at an interface called INTERFACE."""

    def __init__(self) -> None:
        self._names = [f"dynrank-{os.getpid()}-{letter}" for letter in "ab"]

    def make(self) -> None:
        """Make them, with the cable plugged in."""
        first, second = self._names
        for name in self._names:
            _ip("netns", "add", name)
        _ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", "lo", "up")
        self.set_cable("up")

    def remove(self) -> None:
        """Remove them, as far as they were made, with all that runs on them."""
        for host, name in enumerate(self._names):
            with suppress(subprocess.CalledProcessError):  # it was not made
                self.kill(host)
                _ip("netns", "del", name)

    def set_cable(self, state: str) -> None:
        """Plug the cable in, `up`, or out, `down`."""
        for name in self._names:
            _ip("-n", name, "link", "set", INTERFACE, state)

    def start(self, host: int, words: list[str], log: Path, environment: Mapping[str, str]) -> psutil.Popen:
        """Start a command on a host; what it prints goes to a file."""
        with log.open("a") as file:
            return psutil.Popen(
                ["ip", "netns", "exec", self._names[host], *words],
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def processes(self, host: int) -> list[psutil.Process]:
        """All that runs on a host, whoever started it."""
        found = []
        for number in _ip("netns", "pids", self._names[host]).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(number)))
        return found

    def kill(self, host: int) -> None:
        """End all that runs on a host, as a host that loses its power does."""
        while left := self.processes(host):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 5)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts that are gone afterwards."""
    made = Hosts()
    try:
        made.make()
        yield made
    finally:
        made.remove()


def start_ssh_servers(hosts: Hosts, folder: Path) -> dict[str, str]:
    """Start a server on each host that lets root in; return the variables by which pdsh finds them."""
    key, host_key = folder / "key", folder / "host_key"
    for path in (key, host_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it to be there
    for host, address in enumerate(ADDRESSES):
        configuration = folder / f"sshd-{host}"
        configuration.write_text(
            f"Port 2222\nListenAddress {address}\nHostKey {host_key}\nAuthorizedKeysFile {key}.pub\n"
            "PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        )
        sshd = shutil.which("sshd") or "/usr/sbin/sshd"
        hosts.start(host, [sshd, "-D", "-e", "-f", str(configuration)], folder / f"sshd-{host}.log", {})
    options = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "ServerAliveInterval": "5"}
    text = " ".join(f"-o {name}={value}" for name, value in options.items())
    return {"PDSH_SSH_ARGS_APPEND": f"-i {key} -p 2222 {text}"}
