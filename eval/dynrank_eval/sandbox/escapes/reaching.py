"""Attempts to reach what is outside: files, processes, the network, other users' rights."""

from dynrank_eval.sandbox.escapes.base import EITHER, Escape, solve

OUTSIDE = [
    Escape("read-file", "a file outside", solve("return open('@FILE@').read()")),
    Escape(
        "read-by-link",
        "a file outside, by a symlink",
        solve("os.symlink('@FILE@', 'l')\nreturn open('l').read()"),
    ),
    Escape(
        "read-by-hard-link",
        "a file outside, by a hard link",
        solve("os.link('@FILE@', 'l')\nreturn open('l').read()"),
    ),
    Escape(
        "read-by-proc-root",
        "a file outside, by another process's root",
        solve(
            "for pid in ('1', 'self', '@VICTIM@', '@EVALUATOR@', str(os.getppid())):\n"
            "    for way in ('root', 'cwd/../../../../..'):\n"
            "        try: return open(f'/proc/{pid}/{way}@FILE@').read()\n"
            "        except OSError: pass"
        ),
    ),
    Escape(
        "read-by-program",
        "a file outside, by another program",
        solve(
            "import subprocess\nreturn subprocess.run(['cat', '@FILE@'], capture_output=True, text=True).stdout"
        ),
    ),
    Escape(
        "inherited-descriptors",
        "descriptors that were left open",
        solve(
            "for fd in range(3, 1024):\n"
            "    for name in ('@FILE@', '..@FILE@', '../../../..@FILE@'):\n"
            "        try: return open(os.open(name.lstrip('/'), os.O_RDONLY, dir_fd=fd)).read()\n"
            "        except OSError: pass"
        ),
    ),
    Escape("write-file", "a file outside", solve("open('@FOLDER@/written', 'w').write('x')")),
    Escape(
        "write-by-link",
        "a file outside, by a symlink",
        solve("os.symlink('@FOLDER@', 'l')\nopen('l/linked', 'w').write('x')"),
    ),
    Escape("overwrite-file", "a file outside", solve("open('@FILE@', 'w').write('x')")),
    Escape("remove-file", "a file outside", solve("os.remove('@FILE@')")),
    Escape(
        "rename-in",
        "a file outside, by renaming it",
        solve("os.rename('@FILE@', 'mine')\nreturn open('mine').read()"),
    ),
    Escape(
        "devices",
        "the kernel's memory and disks",
        solve("return [open(p, 'rb').read(16) for p in ('/dev/mem', '/dev/kmsg', '/dev/sda', '/dev/vda')]"),
    ),
    Escape(
        "make-device",
        "a device of its own",
        solve("os.mknod('d', 0o60666, os.makedev(254, 0))\nreturn open('d', 'rb').read(16)"),
    ),
    Escape(
        "parent-environment",
        "the environment of other processes",
        solve(
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
        solve(
            "for pid in ('@VICTIM@', '@EVALUATOR@', str(os.getppid())):\n"
            "    try: open(f'/proc/{pid}/mem', 'rb+'); return open('@FILE@').read()\n"
            "    except OSError: pass"
        ),
    ),
    Escape(
        "trace-parent",
        "other processes, by ptrace",
        solve(
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "for pid in (@VICTIM@, @EVALUATOR@, os.getppid()):\n"
            "    if libc.ptrace(16, pid, 0, 0) == 0:\n"
            "        libc.kill(pid, 9)"
        ),
        kills=True,
    ),
    Escape("kill-victim", "a process of the same user", solve("os.kill(@VICTIM@, 9)"), kills=True),
    Escape(
        "signal-by-descriptor",
        "a process of the same user, as the owner of a pipe",
        solve(
            "import fcntl\nr, w = os.pipe()\n"
            "fcntl.fcntl(r, 8, @VICTIM@)\nfcntl.fcntl(r, 10, 9)\n"
            "fcntl.fcntl(r, 4, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')"
        ),
        kills=True,
    ),
    Escape("kill-evaluator", "the evaluator", solve("os.kill(@EVALUATOR@, 9)"), kills=True),
    Escape(
        "stop-parent",
        "the parent",
        solve("os.kill(os.getppid(), 19)\nos.kill(os.getppid(), 9)"),
        EITHER,
        kills=True,
    ),
    Escape("kill-group", "its process group", solve("os.kill(0, 9)")),
    Escape("kill-everything", "every process it may", solve("os.kill(-1, 9)"), EITHER, kills=True),
]

NETWORK = [
    Escape(
        "tcp-loopback",
        "a server on this machine",
        solve("import socket\nreturn socket.create_connection(('127.0.0.1', @PORT@), 2).recv(99).decode()"),
    ),
    Escape(
        "tcp-loopback-6",
        "a server on this machine, by IPv6",
        solve(
            "import socket\nreturn socket.create_connection(('::ffff:127.0.0.1', @PORT@), 2).recv(99).decode()"
        ),
    ),
    Escape(
        "udp-loopback",
        "a server on this machine, by UDP",
        solve(
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(1)\n"
            "s.sendto(b'?', ('127.0.0.1', @PORT@))\nreturn s.recv(99).decode()"
        ),
    ),
    Escape(
        "unix-socket",
        "a server on this machine, by a path",
        solve(
            "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('@SOCKET@')\nreturn s.recv(99).decode()"
        ),
    ),
    Escape(
        "abstract-socket",
        "a server on this machine, by an abstract name",
        solve(
            "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0@ABSTRACT@')\nreturn s.recv(99).decode()"
        ),
    ),
    Escape(
        "interfaces",
        "a way out of this machine",
        solve(
            "import socket\nnames = [name for _, name in socket.if_nameindex() if name != 'lo']\n"
            "s = socket.socket()\ns.bind(('0.0.0.0', 0))\n"
            "return socket.create_connection(('127.0.0.1', @PORT@), 2).recv(99).decode() if names else None"
        ),
    ),
]

PRIVILEGE = [
    Escape("become-root", "the root user", solve("os.setuid(0)\nreturn open('@FILE@').read()"), ("failed",)),
    Escape(
        "setuid-program",
        "root by a program with the setuid bit",
        solve(
            "import subprocess\n"
            "command = ['su', '-c', 'cat @FILE@']\n"
            "return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout"
        ),
    ),
    Escape(
        "own-namespace",
        "rights in a user namespace of its own",
        solve(
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
        solve(
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "os.mkdir('r')\nlibc.chroot(b'r')\n"
            "for _ in range(40): os.chdir('..')\n"
            "libc.chroot(b'.')\nreturn open('@FILE@').read()"
        ),
    ),
]
