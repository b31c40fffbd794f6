"""What a sandboxed process does to itself before anything that is not ours runs in it."""

import ctypes
import os
import resource
import sys
from typing import Any

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2


def confine(settings: dict[str, Any]) -> None:
    """Set limits, import paths, Landlock, user, seccomp: in this order, each may need what the next takes away.

    Raises:
        OSError, ValueError: something of it is not possible here.
    """
    sys.path += [folder for folder in settings["packages"] if folder not in sys.path]
    if settings["uid"] is not None and settings["reopen_imports"]:
        keep_imports_reachable()
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if settings["landlock"] is not None:
        confine_files(**settings["landlock"])
    if settings["uid"] is not None:
        drop_user(settings["uid"])
    control(_PR_SET_NO_NEW_PRIVS, 1, 0)
    if settings["seccomp"] is not None:
        confine_calls(bytes.fromhex(settings["seccomp"]))


def keep_imports_reachable() -> None:
    """Address the import folders through descriptors opened as root.

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


def confine_files(readable: list[str], writable: list[str]) -> None:
    """Restrict the process by Landlock: read and execute these, write those as well, open no other file."""
    from landlockpy import AccessFS, Ruleset, Scope

    read = AccessFS.READ_FILE | AccessFS.READ_DIR | AccessFS.EXECUTE
    write = AccessFS.WRITE_FILE | AccessFS.TRUNCATE | AccessFS.MAKE_REG | AccessFS.MAKE_DIR
    write |= AccessFS.REMOVE_FILE | AccessFS.REMOVE_DIR | AccessFS.MAKE_SYM
    with Ruleset(scoped=Scope.SIGNAL | Scope.ABSTRACT_UNIX_SOCKET) as rules:
        for path in readable:
            rules.allow_path(path, read if os.path.isdir(path) else AccessFS.READ_FILE | AccessFS.EXECUTE)
        for path in writable:
            rules.allow_path(
                path, read | write if os.path.isdir(path) else AccessFS.READ_FILE | AccessFS.WRITE_FILE
            )
        rules.restrict()


def drop_user(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def confine_calls(program: bytes) -> None:
    """Load a seccomp filter in the kernel's binary form, 8 bytes an instruction."""
    code = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    filter_ = Filter(len(program) // 8, ctypes.addressof(code))
    control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_))


def control(option: int, first: int, second: int) -> None:
    """Call prctl(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), zero, zero) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
