"""Runs model-written programs so that they do no ordinary harm and cannot easily score without passing.

Covered:
- a fresh isolated interpreter (`python -I`) per program, in its own session and process group;
- started as root, it changes to an unused uid and gid (another for each program running at the time) before
  the program; an ordinary user's programs run as that user;
- limits on wall time (from the moment the program starts), CPU time, address space, file size, open files,
  processes and core dumps;
- an empty environment, stdin at its end, stdout and stderr to /dev/null, no other inherited descriptor but the
  result pipe's;
- a private temporary directory as working directory, removed afterwards;
- at the end, or at the deadline, the whole process group is killed;
- a program passes only if the harness writes a random nonce to the result pipe after the last test returned:
  leaving early (exit, os._exit, SystemExit, a crash) or printing anything scores nothing.

Not covered yet:
- the network and the file system outside the directory (what the uid may read and write stays reachable,
  for an ordinary user everything of theirs);
- children that leave the process group (setsid) and outlive their parent;
- a program that searches its own interpreter for the nonce and writes it to the pipe itself;
- kernel isolation (namespaces, seccomp, Landlock).

So run it where a hostile program finds nothing worth taking: in a container or a virtual machine without
secrets. Linux 5.3 or newer.
"""

from dynrank_eval.sandbox.runner import Limits, Outcome, check, run_programs

__all__ = ["Limits", "Outcome", "check", "run_programs"]
