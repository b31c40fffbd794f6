"""Attempts on the kernel's ways out: each socket family, each namespace and form of clone, each way to a descriptor.

What is created here reaches nothing by itself; a program that gets it loops, so that the verdict is a timeout and not
the wrong answer that is right.
"""

from dynrank_eval.sandbox.escapes.base import Escape, solve

_FAMILIES = "INET INET6 AX25 IPX APPLETALK X25 PACKET NETLINK RDS CAN TIPC BLUETOOTH ALG VSOCK KCM QIPCRTR SMC XDP MCTP"
_NUMBERS = dict(
    zip(
        _FAMILIES.split(),
        (2, 10, 3, 4, 5, 9, 17, 16, 21, 29, 30, 31, 38, 40, 41, 42, 43, 44, 45),
        strict=True,
    )
)
_NAMESPACES = {
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
_LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"

SOCKETS = [
    Escape(
        f"socket-{family.lower()}",
        f"a socket of the family AF_{family}",
        solve(
            "import socket\n"
            "for kind in (1, 2, 3, 5):\n"
            "    for protocol in (0, 1, 3, 17):\n"
            f"        try: socket.socket({number}, kind, protocol)\n"
            "        except OSError: continue\n"
            "        while True: pass"
        ),
    )
    for family, number in _NUMBERS.items()
] + [
    Escape(
        "socket-any-family",
        "a socket of any family but AF_UNIX, its number in high bits too",
        solve(
            _LIBC + "for family in [*range(2, 64), 1 | 1 << 32, 2 | 1 << 32, 40 | 1 << 40]:\n"
            "    for call in (41, 53):\n"
            "        ends = (ctypes.c_int * 2)()\n"
            "        given = libc.syscall(call, ctypes.c_long(family), 1, 0, ends)\n"
            "        while given >= 0: pass"
        ),
    )
]

NAMESPACES = [
    Escape(
        f"unshare-{name}",
        f"a {name} namespace of its own",
        solve(_LIBC + f"while libc.unshare({flag}) == 0 or libc.unshare({flag} | 0x10000000) == 0: pass"),
    )
    for name, flag in _NAMESPACES.items()
]
NAMESPACES += [
    Escape(
        f"clone-{name}",
        f"a child in a {name} namespace of its own",
        solve(
            _LIBC + f"for flags in ({flag} | 17, {flag} | 0x10000000 | 17):\n"
            "    child = libc.syscall(56, flags, 0, 0, 0, 0)\n"
            "    if child == 0: os._exit(0)\n"
            "    while child > 0: pass"
        ),
    )
    for name, flag in _NAMESPACES.items()
]
NAMESPACES += [
    Escape(
        "clone3",
        "a child whose flags no filter sees",
        solve(
            _LIBC + "arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)\n"
            "child = libc.syscall(435, arguments, 88)\n"
            "if child == 0: os._exit(0)\n"
            "while child > 0: pass"
        ),
    ),
    Escape(
        "setns",
        "another process's namespaces",
        solve(
            _LIBC + "for name in ('net', 'mnt', 'user', 'pid'):\n"
            "    for pid in ('1', '@VICTIM@', '@EVALUATOR@', str(os.getppid())):\n"
            "        try: fd = os.open(f'/proc/{pid}/ns/{name}', os.O_RDONLY)\n"
            "        except OSError: continue\n"
            "        while libc.setns(fd, 0) == 0: pass"
        ),
    ),
]

DESCRIPTORS = [
    Escape(
        "pidfd-getfd",
        "another process's descriptor, by its pidfd",
        solve(
            _LIBC + "for pid in (1, @VICTIM@, @EVALUATOR@, os.getppid()):\n"
            "    handle = libc.syscall(434, pid, 0)\n"
            "    for fd in range(16):\n"
            "        while handle >= 0 and libc.syscall(438, handle, fd, 0) >= 0: pass"
        ),
    ),
    Escape(
        "proc-fd",
        "another process's descriptor, by /proc",
        solve(
            "for pid in ('1', '@VICTIM@', '@EVALUATOR@', str(os.getppid())):\n"
            "    for fd in range(16):\n"
            "        try: os.open(f'/proc/{pid}/fd/{fd}', os.O_RDWR)\n"
            "        except OSError: continue\n"
            "        while True: pass"
        ),
    ),
    Escape(
        "file-handle",
        "a file outside, by its handle",
        solve(
            _LIBC + "handle = (ctypes.c_uint32 * 34)(128)\n"
            "mount = ctypes.c_int()\n"
            "while libc.name_to_handle_at(-100, b'/', handle, ctypes.byref(mount), 0) == 0: pass"
        ),
    ),
    Escape(
        "io-uring",
        "sockets and files, by a queue that no filter sees",
        solve(_LIBC + "while libc.syscall(425, 8, (ctypes.c_uint8 * 120)()) >= 0: pass"),
    ),
]

MACHINE = [
    Escape(
        "widen-cpus",
        "more CPUs than the evaluator may use",
        solve("os.sched_setaffinity(0, range(os.cpu_count()))\nwhile True: pass"),
    ),
    Escape(
        "command-lines",
        "paths of the host in command lines",
        solve(
            "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
            "    try: text = open(f'/proc/{pid}/cmdline').read()\n"
            "    except OSError: continue\n"
            "    while 'bind' in text: pass"
        ),
    ),
    Escape(
        "mounts",
        "paths of the host in the list of mounts",
        solve(
            "for name in ('mountinfo', 'mounts', 'mountstats'):\n"
            "    try: text = open(f'/proc/self/{name}').read()\n"
            "    except OSError: continue\n"
            "    while text: pass"
        ),
    ),
]

LABEL = [
    Escape(
        f"forge-{name}",
        "another label than wrong, by a forged message",
        f"import os\ndef forge():\n    for fd in range(3, 64):\n"
        f"        try: os.write(fd, {message!r} * 3)\n        except OSError: pass\n"
        f"{'forge()' if early else ''}\ndef solve():\n    forge()\n",
    )
    for name, message, early in [
        ("unparsable", b'{"unparsable": true}\n', False),
        ("unparsable-early", b'{"unparsable": true}\n', True),
        ("not-parsed", b'{"parsed": false}\n', False),
        ("not-parsed-early", b'{"parsed": false}\n', True),
        ("passed", b"test passed\npassed\n", True),
        ("timeout", b'{"timeout": true}\n', True),
        ("torn", b'{"value": ', False),
        ("nothing", b"\n", True),
    ]
]
