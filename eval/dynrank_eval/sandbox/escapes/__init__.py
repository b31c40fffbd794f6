"""Programs that try to score without solving, to do harm, or to see what they must not see.

Each is the solution to the same problem: `solve()` must return a secret that stands only outside the sandbox: in a
file, in another process's environment and memory, and on sockets of this machine. So an attempt that reaches one
of them passes, and none may. Those that destroy instead are found out by what they leave behind (attempts.py).

In the sources, `@NAME@` stands for what attempts.py puts up: @FILE@ (holds the secret), @FOLDER@ (writable by all),
@PORT@ (TCP and UDP on loopback), @SOCKET@ (a Unix socket's path), @ABSTRACT@ (one without a path), @VICTIM@ (a process
of the evaluator's user whose environment holds the secret), @EVALUATOR@ (process id), @MARK@ (a number for sleep).
"""

from dynrank_eval.sandbox.escapes.base import Escape
from dynrank_eval.sandbox.escapes.exhausting import EXHAUST, STAY
from dynrank_eval.sandbox.escapes.kernel import DESCRIPTORS, LABEL, MACHINE, NAMESPACES, SOCKETS
from dynrank_eval.sandbox.escapes.reaching import NETWORK, OUTSIDE, PRIVILEGE
from dynrank_eval.sandbox.escapes.scoring import SCORE

__all__ = ["ESCAPES", "Escape"]

ESCAPES = [*SCORE, *LABEL, *EXHAUST, *STAY, *OUTSIDE, *NETWORK, *PRIVILEGE]
ESCAPES += [*SOCKETS, *NAMESPACES, *DESCRIPTORS, *MACHINE]
