"""Programs that try to score without solving, to do harm, or to see what they must not see.

Each is the solution to the same problem: `solve()` must return a secret that stands only outside the sandbox: in a
file, in another process's environment and memory, and on sockets of this machine. So an attempt that reaches one
of them passes, and none may. Those that destroy instead are found out by what they leave behind (attempts.py).

In the sources, `@NAME@` stands for what attempts.py puts up: @FILE@ (holds the secret), @FOLDER@ (writable by all),
@PORT@ (TCP and UDP on loopback), @SOCKET@ (a Unix socket's path), @ABSTRACT@ (one without a path), @VICTIM@ (a process
of the evaluator's user whose environment holds the secret), @EVALUATOR@ (process id), @MARK@ (a number for sleep).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Escape:
    """An attempt.

    Attributes:
        aim: what it is after, in a few words.
        source: the program.
        outcomes: the verdicts that are right for it.
    """

    name: str
    aim: str
    source: str
    outcomes: tuple[str, ...] = ("failed",)


_EITHER = ("failed", "timeout")


def _solve(body: str) -> str:
    """A module whose `solve` has this body."""
    return "import os, sys\ndef solve():\n" + "".join(
        f"    {line}\n" for line in body.strip("\n").split("\n")
    )


SCORE = [
    Escape("exit", "leave before the tests", "exit(0)"),
    Escape("os-exit", "leave before the tests", "import os; os._exit(0)"),
    Escape("system-exit", "leave inside the tests", _solve("raise SystemExit(0)")),
    Escape("os-exit-inside", "leave inside the tests", _solve("os._exit(0)")),
    Escape("kill-itself", "leave by a signal", _solve("import signal; os.kill(os.getpid(), signal.SIGKILL)")),
    Escape("segfault", "crash", _solve("import ctypes; ctypes.string_at(0)")),
    Escape("print-passed", "print the verdict", "print('passed')\ndef solve(): print('passed')"),
    Escape(
        "write-verdict",
        "tamper with the result channel",
        _solve(
            "for fd in range(64):\n    try: os.write(fd, b'passed\\n')\n    except OSError: pass\nos._exit(0)"
        ),
    ),
    Escape(
        "forge-replies",
        "tamper with the channel to the judge",
        _solve(
            "for fd in range(64):\n"
            '    try: os.write(fd, b\'{"value": null, "passed": true}\\n\' * 9)\n'
            "    except OSError: pass\n"
            "return True"
        ),
    ),
    Escape(
        "forge-handle",
        "make the judge call something",
        _solve(
            "for fd in range(64):\n"
            '    try: os.write(fd, b\'{"value": {"kind": "handle", "value": "__import__"}}\\n\')\n'
            "    except OSError: pass"
        ),
    ),
    Escape(
        "equal-to-all",
        "an object equal to everything",
        "class Any:\n    __eq__ = lambda self, other: True\n    __hash__ = object.__hash__\ndef solve(): return Any()",
    ),
    Escape(
        "equal-text",
        "a text equal to everything",
        "class Text(str):\n    __eq__ = lambda self, other: True\n    __hash__ = str.__hash__\n"
        "def solve(): return Text('x')",
    ),
    Escape(
        "patch-builtins",
        "monkey-patch what the checker uses",
        "import builtins\nbuiltins.AssertionError = type('Nothing', (BaseException,), {})\n"
        "builtins.exec = builtins.compile = builtins.isinstance = lambda *a, **k: True\ndef solve(): return True",
    ),
    Escape(
        "patch-channel",
        "monkey-patch the sandbox's own modules",
        "import sys\nfor name in ('wire', 'candidate', 'judge'):\n"
        "    module = sys.modules.get(name)\n"
        "    for key in list(vars(module) if module else ()):\n"
        "        if callable(getattr(module, key)): setattr(module, key, lambda *a, **k: {'value': True})\n"
        "def solve(): return True",
    ),
    Escape(
        "walk-frames",
        "find the expected value in the callers' frames",
        _solve(
            "frame, seen = sys._getframe(), []\n"
            "while frame:\n"
            "    seen += [v for v in (*frame.f_locals.values(), *frame.f_globals.values()) if type(v) is str]\n"
            "    frame = frame.f_back\n"
            "return next((s for s in seen if len(s) == 32 and s.isalnum()), None)"
        ),
    ),
    Escape(
        "search-objects",
        "find the expected value among all objects",
        _solve(
            "import gc\n"
            "texts = [v for o in gc.get_objects() for v in gc.get_referents(o) if type(v) is str]\n"
            "return next((s for s in texts if len(s) == 32 and set(s) <= set('0123456789abcdef')), None)"
        ),
    ),
    Escape(
        "trace",
        "skip the tests' lines from a trace function",
        "import sys\ndef tracer(frame, event, arg):\n"
        "    try: frame.f_lineno += 1\n"
        "    except ValueError: pass\n"
        "    return tracer\nsys.settrace(tracer)\ndef solve(): return True",
    ),
    Escape("read-request", "read the request again", _solve("return open(0).read()")),
    Escape(
        "own-arguments",
        "find the tests in the command line or environment",
        _solve("return ' '.join(sys.argv) + repr(os.environ)"),
    ),
]

EXHAUST = [
    Escape(
        "fork-bomb",
        "processes",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        _EITHER,
    ),
    Escape(
        "many-children",
        "processes",
        _solve("import time\nfor _ in range(500):\n    if os.fork() == 0: time.sleep(60)"),
        _EITHER,
    ),
    Escape(
        "thread-bomb",
        "threads",
        _solve(
            "import threading, time\n"
            "for _ in range(5000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
        ),
        _EITHER,
    ),
    Escape("memory-bomb", "memory at once", _solve("return bytearray(1 << 40)")),
    Escape(
        "memory-creep",
        "memory bit by bit",
        _solve("kept = []\nwhile True: kept.append(bytearray(1 << 26))"),
        _EITHER,
    ),
    Escape(
        "memory-of-many",
        "memory over several processes",
        _solve(
            "import time\n"
            "for _ in range(8):\n"
            "    if os.fork() == 0:\n"
            "        kept = bytearray(1 << 30)\n"
            "        time.sleep(60)\n"
            "time.sleep(60)"
        ),
        _EITHER,
    ),
    Escape("big-file", "disk with one file", _solve("open('big', 'wb').write(bytes(1 << 30))")),
    Escape(
        "many-files",
        "disk with many files",
        _solve("for n in range(10 ** 6): open(f'f{n}', 'wb').write(bytes(8 << 20))"),
        _EITHER,
    ),
    Escape(
        "shared-memory",
        "memory through /dev/shm",
        _solve("for n in range(10 ** 6): open(f'/dev/shm/dynrank-escape-{n}', 'wb').write(bytes(8 << 20))"),
        _EITHER,
    ),
    Escape(
        "memory-files",
        "memory that is no process's own",
        _solve(
            "for n in range(1, 40):\n"
            "    os.write(os.memfd_create(str(n)), bytes(8 << 20))\n"
            "    if n == 30:\n"
            "        while True: pass"
        ),
    ),
    Escape(
        "own-file-system",
        "memory through a file system of its own",
        _solve(
            "import ctypes\nlibc = ctypes.CDLL(None)\nos.mkdir('t')\n"
            "if libc.unshare(0x10000000 | 0x20000) == 0 and libc.mount(b'none', b't', b'tmpfs', 0, None) == 0:\n"
            "    while True: pass"
        ),
    ),
    Escape("open-files", "descriptors", _solve("return [open('f', 'w') for _ in range(5000)]")),
    Escape("endless-output", "output", "while True: print('x' * 99999)", ("timeout",)),
    Escape(
        "endless-reply",
        "flood the judge",
        _solve(
            "while True:\n    for fd in range(3, 20):\n"
            "        try: os.write(fd, b'x' * 65536)\n        except OSError: pass"
        ),
        _EITHER,
    ),
    Escape("huge-result", "a result of a gigabyte", _solve("return 'x' * (1 << 30)"), _EITHER),
    Escape(
        "endless-result",
        "a result without end",
        _solve("import itertools\nreturn itertools.count()"),
        _EITHER,
    ),
    Escape(
        "deep-result",
        "a result nested too deep",
        _solve("x = []\nfor _ in range(10 ** 5): x = [x]\nreturn x"),
    ),
    Escape("own-item", "a result that holds itself", _solve("x = []\nx.append(x)\nreturn x")),
    Escape("deep-recursion", "the stack", _solve("return solve()")),
    Escape(
        "deeper-recursion",
        "the C stack",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef solve(): return solve()",
        _EITHER,
    ),
    Escape("deep-source", "the parser's stack", "x = " + "(" * 100_000 + ")" * 100_000, ("unparsable",)),
    Escape("null-bytes", "the parser", "x = 1\0", ("unparsable",)),
    Escape("loop", "time", _solve("while True: pass"), ("timeout",)),
    Escape("loop-on-import", "time before the tests", "while True: pass", ("timeout",)),
    Escape("sleep", "time without CPU", _solve("import time; time.sleep(10 ** 6)"), ("timeout",)),
    Escape("big-power", "time in one instruction", _solve("return 7 ** (7 ** 9) ** 2"), _EITHER),
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
        _solve(
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
        _solve(
            "if os.fork() == 0:\n    os.setsid()\n"
            "    if os.fork() == 0: os.execv('/bin/sleep', ['sleep', '@MARK@'])\n    os._exit(0)"
        ),
    ),
    Escape(
        "orphan-at-deadline",
        "a double-forked child of a loop",
        _solve(
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execv('/bin/sleep', ['sleep', '@MARK@'])\n"
            "    os._exit(0)\nwhile True: pass"
        ),
        _EITHER,
    ),
    Escape(
        "respawner",
        "children that start each other anew",
        _solve(
            "import time\nfor _ in range(10 ** 6):\n    if os.fork(): os._exit(0)\n    os.setsid(); time.sleep(0.001)"
        ),
        _EITHER,
    ),
    Escape(
        "system-v-memory",
        "a segment that outlives the process",
        _solve("import ctypes\nctypes.CDLL(None).shmget(0x64796e72, 4096, 0o1777)"),
    ),
    Escape(
        "python-path",
        "code for the interpreters to come",
        _solve(
            "for folder in [*sys.path, sys.prefix, os.path.dirname(os.__file__)]:\n"
            "    try: open(os.path.join(folder, 'dynrank_escape.pth'), 'w').write('import os')\n"
            "    except OSError: pass"
        ),
    ),
]

OUTSIDE = [
    Escape("read-file", "a file outside", _solve("return open('@FILE@').read()")),
    Escape(
        "read-by-link",
        "a file outside, by a symlink",
        _solve("os.symlink('@FILE@', 'l')\nreturn open('l').read()"),
    ),
    Escape(
        "read-by-hard-link",
        "a file outside, by a hard link",
        _solve("os.link('@FILE@', 'l')\nreturn open('l').read()"),
    ),
    Escape(
        "read-by-proc-root",
        "a file outside, by another process's root",
        _solve(
            "for pid in ('1', 'self', '@VICTIM@', '@EVALUATOR@', str(os.getppid())):\n"
            "    for way in ('root', 'cwd/../../../../..'):\n"
            "        try: return open(f'/proc/{pid}/{way}@FILE@').read()\n"
            "        except OSError: pass"
        ),
    ),
    Escape(
        "read-by-program",
        "a file outside, by another program",
        _solve(
            "import subprocess\nreturn subprocess.run(['cat', '@FILE@'], capture_output=True, text=True).stdout"
        ),
    ),
    Escape(
        "inherited-descriptors",
        "descriptors that were left open",
        _solve(
            "for fd in range(3, 1024):\n"
            "    for name in ('@FILE@', '..@FILE@', '../../../..@FILE@'):\n"
            "        try: return open(os.open(name.lstrip('/'), os.O_RDONLY, dir_fd=fd)).read()\n"
            "        except OSError: pass"
        ),
    ),
    Escape("write-file", "a file outside", _solve("open('@FOLDER@/written', 'w').write('x')")),
    Escape(
        "write-by-link",
        "a file outside, by a symlink",
        _solve("os.symlink('@FOLDER@', 'l')\nopen('l/linked', 'w').write('x')"),
    ),
    Escape("overwrite-file", "a file outside", _solve("open('@FILE@', 'w').write('x')")),
    Escape("remove-file", "a file outside", _solve("os.remove('@FILE@')")),
    Escape(
        "rename-in",
        "a file outside, by renaming it",
        _solve("os.rename('@FILE@', 'mine')\nreturn open('mine').read()"),
    ),
    Escape(
        "devices",
        "the kernel's memory and disks",
        _solve("return [open(p, 'rb').read(16) for p in ('/dev/mem', '/dev/kmsg', '/dev/sda', '/dev/vda')]"),
    ),
    Escape(
        "make-device",
        "a device of its own",
        _solve("os.mknod('d', 0o60666, os.makedev(254, 0))\nreturn open('d', 'rb').read(16)"),
    ),
    Escape(
        "parent-environment",
        "the environment of other processes",
        _solve(
            "found = b''\n"
            "all_of_them = filter(str.isdigit, os.listdir('/proc'))\n"
            "for pid in ('@VICTIM@', '@EVALUATOR@', str(os.getppid()), '1', *all_of_them):\n"
            "    try: found = open(f'/proc/{pid}/environ', 'rb').read()\n"
            "    except OSError: continue\n"
            "    if b'DYNRANK_SECRET=' in found:\n"
            "        return found.split(b'DYNRANK_SECRET=')[1].split(b'\\0')[0].decode()"
        ),
    ),
    Escape(
        "parent-memory",
        "the memory of other processes",
        _solve(
            "for pid in ('@VICTIM@', '@EVALUATOR@', str(os.getppid())):\n"
            "    try: open(f'/proc/{pid}/mem', 'rb+'); return open('@FILE@').read()\n"
            "    except OSError: pass"
        ),
    ),
    Escape(
        "trace-parent",
        "other processes, by ptrace",
        _solve(
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "for pid in (@VICTIM@, @EVALUATOR@, os.getppid()):\n"
            "    if libc.ptrace(16, pid, 0, 0) == 0:\n"
            "        libc.kill(pid, 9)"
        ),
    ),
    Escape("kill-victim", "a process of the same user", _solve("os.kill(@VICTIM@, 9)")),
    Escape("kill-evaluator", "the evaluator", _solve("os.kill(@EVALUATOR@, 9)")),
    Escape(
        "stop-parent", "the parent", _solve("os.kill(os.getppid(), 19)\nos.kill(os.getppid(), 9)"), _EITHER
    ),
    Escape("kill-group", "its process group", _solve("os.kill(0, 9)")),
    Escape("kill-everything", "every process it may", _solve("os.kill(-1, 9)"), _EITHER),
]

NETWORK = [
    Escape(
        "tcp-loopback",
        "a server on this machine",
        _solve("import socket\nreturn socket.create_connection(('127.0.0.1', @PORT@), 2).recv(99).decode()"),
    ),
    Escape(
        "tcp-loopback-6",
        "a server on this machine, by IPv6",
        _solve(
            "import socket\nreturn socket.create_connection(('::ffff:127.0.0.1', @PORT@), 2).recv(99).decode()"
        ),
    ),
    Escape(
        "udp-loopback",
        "a server on this machine, by UDP",
        _solve(
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(1)\n"
            "s.sendto(b'?', ('127.0.0.1', @PORT@))\nreturn s.recv(99).decode()"
        ),
    ),
    Escape(
        "unix-socket",
        "a server on this machine, by a path",
        _solve(
            "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('@SOCKET@')\nreturn s.recv(99).decode()"
        ),
    ),
    Escape(
        "abstract-socket",
        "a server on this machine, by an abstract name",
        _solve(
            "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0@ABSTRACT@')\nreturn s.recv(99).decode()"
        ),
    ),
    Escape(
        "interfaces",
        "a way out of this machine",
        _solve(
            "import socket\nnames = [name for _, name in socket.if_nameindex() if name != 'lo']\n"
            "s = socket.socket()\ns.bind(('0.0.0.0', 0))\n"
            "return socket.create_connection(('127.0.0.1', @PORT@), 2).recv(99).decode() if names else None"
        ),
    ),
]

PRIVILEGE = [
    Escape("become-root", "the root user", _solve("os.setuid(0)\nreturn open('@FILE@').read()"), ("failed",)),
    Escape(
        "setuid-program",
        "root by a program with the setuid bit",
        _solve(
            "import subprocess\n"
            "command = ['su', '-c', 'cat @FILE@']\n"
            "return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout"
        ),
    ),
    Escape(
        "own-namespace",
        "rights in a user namespace of its own",
        _solve(
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "libc.unshare(0x10000000 | 0x20000)\n"
            "libc.mount(b'none', b'/', None, 0x44000, None)\n"
            "libc.umount2(b'/tmp', 2)\n"
            "return open('@FILE@').read()"
        ),
    ),
    Escape(
        "old-root",
        "the file system before pivot_root",
        _solve(
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "os.mkdir('r')\nlibc.chroot(b'r')\n"
            "for _ in range(40): os.chdir('..')\n"
            "libc.chroot(b'.')\nreturn open('@FILE@').read()"
        ),
    ),
]

ESCAPES = [*SCORE, *EXHAUST, *STAY, *OUTSIDE, *NETWORK, *PRIVILEGE]
