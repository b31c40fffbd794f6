"""Attempts to use up the machine, and to leave something behind."""

from dynrank_eval.sandbox.escapes.base import EITHER, Escape, solve

EXHAUST = [
    Escape(
        "fork-bomb",
        "processes",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        EITHER,
    ),
    Escape(
        "many-children",
        "processes",
        solve("import time\nfor _ in range(500):\n    if os.fork() == 0: time.sleep(60)"),
        EITHER,
    ),
    Escape(
        "thread-bomb",
        "threads",
        solve(
            "import threading, time\n"
            "for _ in range(5000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
        ),
        EITHER,
    ),
    Escape("memory-bomb", "memory at once", solve("return bytearray(1 << 40)")),
    Escape(
        "memory-creep",
        "memory bit by bit",
        solve("kept = []\nwhile True: kept.append(bytearray(1 << 26))"),
        EITHER,
    ),
    Escape(
        "memory-of-many",
        "memory over several processes",
        solve(
            "import time\n"
            "for _ in range(8):\n"
            "    if os.fork() == 0:\n"
            "        kept = bytearray(1 << 30)\n"
            "        time.sleep(60)\n"
            "time.sleep(60)"
        ),
        EITHER,
    ),
    Escape("big-file", "disk with one file", solve("open('big', 'wb').write(bytes(1 << 30))")),
    Escape(
        "many-files",
        "disk with many files",
        solve("for n in range(10 ** 6): open(f'f{n}', 'wb').write(bytes(8 << 20))"),
        EITHER,
    ),
    Escape(
        "shared-memory",
        "memory through /dev/shm",
        solve("for n in range(10 ** 6): open(f'/dev/shm/dynrank-escape-{n}', 'wb').write(bytes(8 << 20))"),
        EITHER,
    ),
    Escape(
        "memory-files",
        "memory that is no process's own",
        solve(
            "for n in range(1, 40):\n"
            "    os.write(os.memfd_create(str(n)), bytes(8 << 20))\n"
            "    if n == 30:\n"
            "        while True: pass"
        ),
    ),
    Escape(
        "own-file-system",
        "memory through a file system of its own",
        solve(
            "import ctypes\nlibc = ctypes.CDLL(None)\nos.mkdir('t')\n"
            "if libc.unshare(0x10000000 | 0x20000) == 0 and libc.mount(b'none', b't', b'tmpfs', 0, None) == 0:\n"
            "    while True: pass"
        ),
    ),
    Escape("open-files", "descriptors", solve("return [open('f', 'w') for _ in range(5000)]")),
    Escape("endless-output", "output", "while True: print('x' * 99999)", ("timeout",)),
    Escape(
        "endless-reply",
        "flood the judge",
        solve(
            "while True:\n    for fd in range(3, 20):\n"
            "        try: os.write(fd, b'x' * 65536)\n        except OSError: pass"
        ),
        EITHER,
    ),
    Escape("huge-result", "a result of a gigabyte", solve("return 'x' * (1 << 30)"), EITHER),
    Escape(
        "endless-result",
        "a result without end",
        solve("import itertools\nreturn itertools.count()"),
        EITHER,
    ),
    Escape(
        "deep-result",
        "a result nested too deep",
        solve("x = []\nfor _ in range(10 ** 5): x = [x]\nreturn x"),
    ),
    Escape("own-item", "a result that holds itself", solve("x = []\nx.append(x)\nreturn x")),
    Escape("deep-recursion", "the stack", solve("return solve()")),
    Escape(
        "deeper-recursion",
        "the C stack",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef solve(): return solve()",
        EITHER,
    ),
    Escape("deep-source", "the parser's stack", "x = " + "(" * 100_000 + ")" * 100_000, ("unparsable",)),
    Escape("null-bytes", "the parser", "x = 1\0", ("unparsable",)),
    Escape("loop", "time", solve("while True: pass"), ("timeout",)),
    Escape("loop-on-import", "time before the tests", "while True: pass", ("timeout",)),
    Escape("sleep", "time without CPU", solve("import time; time.sleep(10 ** 6)"), ("timeout",)),
    Escape("big-power", "time in one instruction", solve("return 7 ** (7 ** 9) ** 2"), EITHER),
    Escape(
        "ignore-signals",
        "outlive the deadline",
        "import signal\nfor n in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        ("timeout",),
    ),
    Escape(
        "raise-limits",
        "more than allowed",
        solve(
            "import resource\n"
            "for name in ('RLIMIT_CPU', 'RLIMIT_AS', 'RLIMIT_NPROC', 'RLIMIT_FSIZE', 'RLIMIT_NOFILE'):\n"
            "    resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY,) * 2)\n"
            "return open('@FILE@').read()"
        ),
    ),
]

STAY = [
    Escape(
        "orphan",
        "a child that left its group",
        solve(
            "if os.fork() == 0:\n    os.setsid()\n"
            "    if os.fork() == 0: os.execv('/bin/sleep', ['sleep', '@MARK@'])\n    os._exit(0)"
        ),
    ),
    Escape(
        "orphan-at-deadline",
        "a double-forked child of a loop",
        solve(
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execv('/bin/sleep', ['sleep', '@MARK@'])\n"
            "    os._exit(0)\nwhile True: pass"
        ),
        EITHER,
    ),
    Escape(
        "respawner",
        "children that start each other anew",
        solve(
            "import time\nfor _ in range(10 ** 6):\n    if os.fork(): os._exit(0)\n    os.setsid(); time.sleep(0.001)"
        ),
        EITHER,
    ),
    Escape(
        "system-v-memory",
        "a segment that outlives the process",
        solve("import ctypes\nctypes.CDLL(None).shmget(0x64796e72, 4096, 0o1777)"),
    ),
    Escape(
        "python-path",
        "code for the interpreters to come",
        solve(
            "for folder in [*sys.path, sys.prefix, os.path.dirname(os.__file__)]:\n"
            "    try: open(os.path.join(folder, 'dynrank_escape.pth'), 'w').write('import os')\n"
            "    except OSError: pass"
        ),
    ),
]
