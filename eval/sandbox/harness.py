"""The program that runs inside the sandbox's process: limits itself, drops privileges, runs, reports.

Started by `runner.py` as a script with a JSON request on stdin; imports nothing of the package. It writes to
the result pipe: "ready" once the limits hold (or "failed: reason"), then the nonce after the last unit
returned, or "unparsable" if a unit is no valid Python.
"""

import json
import os
import resource
import sys
import types


def main() -> None:
    request = json.load(sys.stdin)
    report = request["report_fd"]
    try:
        if request["uid"] is not None:
            keep_imports_reachable()
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        if request["uid"] is not None:
            drop_privileges(request["uid"])
    except (OSError, ValueError) as error:
        os.write(report, f"failed: {error}\n".encode()[:500])
        sys.exit(1)
    os.write(report, b"ready\n")
    run(request["units"], report, request["nonce"])


def keep_imports_reachable() -> None:
    """Addresses the import folders through descriptors opened as root.

    An interpreter below /root, as pyenv and virtual environments often are, is out of the new user's reach by
    path: its programs could not import the standard library. A descriptor's entry in /proc leads there.
    """
    moved = {}
    for folder in sys.path:
        if os.path.isdir(folder):
            moved[folder] = f"/proc/self/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"
    sys.path[:] = moved.values()
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__ = [relocate(folder, moved) for folder in module.__path__]
    sys.path_importer_cache.clear()


def relocate(folder: str, moved: dict[str, str]) -> str:
    homes = [home for home in moved if folder.startswith(home + os.sep)]
    home = max(homes, key=len, default=None)
    return folder if home is None else moved[home] + folder[len(home) :]


def drop_privileges(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def run(units: list[str], report: int, nonce: str) -> None:
    """Executes the units in one module, as an import would (so `if __name__ == "__main__"` does not run)."""
    try:
        compiled = [compile(unit, "<program>", "exec", dont_inherit=True) for unit in units]
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        os.write(report, b"unparsable\n")
        return
    module = types.ModuleType("program")
    sys.modules["program"] = module
    for code in compiled:
        exec(code, module.__dict__)
    os.write(report, nonce.encode() + b"\n")


if __name__ == "__main__":
    main()
