"""Attempts to get the verdict without the answer."""

from dynrank_eval.sandbox.escapes.base import Escape, solve

SCORE = [
    Escape("exit", "leave before the tests", "exit(0)"),
    Escape("os-exit", "leave before the tests", "import os; os._exit(0)"),
    Escape("system-exit", "leave inside the tests", solve("raise SystemExit(0)")),
    Escape("os-exit-inside", "leave inside the tests", solve("os._exit(0)")),
    Escape("kill-itself", "leave by a signal", solve("import signal; os.kill(os.getpid(), signal.SIGKILL)")),
    Escape("segfault", "crash", solve("import ctypes; ctypes.string_at(0)")),
    Escape("print-passed", "print the verdict", "print('passed')\ndef solve(): print('passed')"),
    Escape(
        "write-verdict",
        "tamper with the result channel",
        solve(
            "for fd in range(64):\n    try: os.write(fd, b'passed\\n')\n    except OSError: pass\nos._exit(0)"
        ),
    ),
    Escape(
        "forge-replies",
        "tamper with the channel to the judge",
        solve(
            "for fd in range(64):\n"
            '    try: os.write(fd, b\'{"value": null, "passed": true}\\n\' * 9)\n'
            "    except OSError: pass\n"
            "return True"
        ),
    ),
    Escape(
        "forge-handle",
        "make the judge call something",
        solve(
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
        solve(
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
        solve(
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
    Escape("read-request", "read the request again", solve("return open(0).read()")),
    Escape(
        "own-arguments",
        "find the tests in the command line or environment",
        solve("return ' '.join(sys.argv) + repr(os.environ)"),
    ),
]
