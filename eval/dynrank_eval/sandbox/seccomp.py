"""System-call filters, compiled by libseccomp (package pyseccomp) into the form that the kernel takes."""

import errno
import functools
import tempfile
from typing import Any

# Kernel objects and memory that no limit counts, and the kernel's own settings: nothing that a solution does.
_EXOTIC = (
    "acct add_key bpf chroot clock_settime delete_module fanotify_init finit_module fsconfig fsmount fsopen "
    "fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load "
    "kexec_load keyctl memfd_create memfd_secret mount mount_setattr move_mount move_pages mq_open msgget "
    "name_to_handle_at open_by_handle_at open_tree perf_event_open pidfd_getfd pivot_root process_madvise "
    "process_vm_readv process_vm_writev ptrace quotactl reboot request_key sched_setaffinity sched_setattr "
    "semget setns settimeofday shmget swapoff swapon syslog umount2 unshare userfaultfd vhangup"
)
# Other processes and the network, where no namespace keeps the program from them.
_OTHERS = (
    "fork kill pidfd_open pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo setpriority socket "
    "tgkill tkill vfork"
)
# A descriptor sends signals to whoever is made its owner: F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP.
_SIGNALLING = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}
_CLONE_THREAD = 0x00010000
# Mount, cgroup, UTS, IPC, user, PID and network namespaces.
_CLONE_NEW = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_AF_UNIX = 1


def available() -> bool:
    """Return whether the package and its library are installed."""
    try:
        _library()
    except (ImportError, RuntimeError):
        # RuntimeError: the package is there, libseccomp is not.
        return False
    return True


@functools.cache
def filter_in_namespaces() -> bytes:
    """Return the filter for a process in namespaces: nothing exotic, no namespace of its own, no socket but AF_UNIX."""
    seccomp = _library()
    rules = _refusing(seccomp, _EXOTIC)
    for flag in _CLONE_NEW:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    # A network namespace leaves AF_VSOCK open, which reaches the host of a virtual machine, and others to come.
    rules.add_rule(seccomp.ERRNO(errno.EPERM), "socket", seccomp.Arg(0, seccomp.NE, _AF_UNIX))
    return _compiled(rules)


@functools.cache
def filter_alone() -> bytes:
    """Return the filter without namespaces: also no sockets, processes (threads stay), signals, limits of others."""
    seccomp = _library()
    rules = _refusing(seccomp, f"{_EXOTIC} {_OTHERS}")
    refuse = seccomp.ERRNO(errno.EPERM)
    rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(refuse, "prlimit64", seccomp.Arg(0, seccomp.NE, 0))
    for call, commands in _SIGNALLING.items():
        for command in commands:
            rules.add_rule(refuse, call, seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFFFFFF, command))
    return _compiled(rules)


def _library() -> Any:
    import pyseccomp

    return pyseccomp


def _refusing(seccomp: Any, calls: str) -> Any:
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in calls.split():
        # A kernel or architecture without the call needs no rule.
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) >= 0:
            rules.add_rule(seccomp.ERRNO(errno.EPERM), name)
    # clone3's flags lie in memory, where no filter looks: where it is missing, the C library calls clone.
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(seccomp.ERRNO(errno.EPERM), "socketpair", seccomp.Arg(0, seccomp.NE, _AF_UNIX))
    return rules


def _compiled(rules: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
