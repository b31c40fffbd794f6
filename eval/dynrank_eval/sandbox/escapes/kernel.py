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
# By their numbers on x86-64, as everywhere here.
_CALLS = {
    # add_key, request_key, keyctl, mq_open, msgget, semget, shmget
    "keys-and-queues": "248 249 250 240 68 64 29",
    # mount, umount2, pivot_root, open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, mount_setattr
    "mounts": "165 166 155 428 429 430 431 432 433 442",
    # init_module, delete_module, finit_module, kexec_load, kexec_file_load, reboot, swapon, swapoff, bpf
    "modules": "175 176 313 246 320 169 167 168 321",
    # acct, settimeofday, clock_settime, iopl, ioperm, syslog, perf_event_open, fanotify_init
    "machine": "163 164 227 172 173 103 298 300",
    # ptrace, process_vm_readv and _writev, kcmp, pidfd_getfd, process_madvise, move_pages, userfaultfd
    "memory-of-others": "101 310 311 312 438 440 279 323",
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
    # clone has no flag for the time namespace.
    for name, flag in {**_NAMESPACES, "time": 0x80}.items()
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
        f"calls-{name}",
        f"the kernel's calls for {name.replace('-', ' ')}",
        solve(
            _LIBC + f"for number in map(int, {numbers!r}.split()):\n"
            "    done = libc.syscall(number, 0, 0, 0, 0, 0, 0)\n"
            # Refused, or unknown to this kernel: any other error comes from looking at the arguments.
            "    while done >= 0 or ctypes.get_errno() not in (1, 38): pass"
        ),
    )
    for name, numbers in _CALLS.items()
]
MACHINE += [
    Escape(
        "widen-cpus",
        "more CPUs than the evaluator may use",
        solve("os.sched_setaffinity(0, range(os.cpu_count()))\nwhile True: pass"),
    ),
    Escape(
        "command-lines",
        "paths of the host in command lines",
        solve(
            "for pid in ('1', 'self', *filter(str.isdigit, os.listdir('/proc'))):\n"
            "    try: text = open(f'/proc/{pid}/cmdline').read()\n"
            "    except OSError: continue\n"
            "    while 'bind' in text or '@FOLDER@'.rsplit('/', 1)[0] in text: pass"
        ),
    ),
    Escape(
        "mounts",
        "paths of the host in the list of mounts",
        solve(
            "for pid in ('1', 'self', 'thread-self'):\n"
            "    for name in ('mountinfo', 'mounts', 'mountstats'):\n"
            "        try: text = open(f'/proc/{pid}/{name}').read()\n"
            "        except OSError: continue\n"
            "        while text: pass"
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
