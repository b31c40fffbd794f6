"""Runs model-written programs so that they do no harm and cannot score without passing.

A program runs as two processes. One holds the solution and nothing else; the other, the judge, holds the tests and
calls the solution through a pipe over which only plain data passes. So a solution can neither see what is expected
nor reach the verdict: leaving early, printing, monkey-patching, objects that equal everything, and hunting through
the interpreter's memory all come to the same as a wrong answer.

Covered for each of the two processes:
- a fresh interpreter without the user's packages and environment (isolated as by `python -I`, but with a fixed hash
  seed, so that a verdict does not change with the order of a set), in its own session and process group;
- started as root, it changes to an unused uid and gid (another for each that runs at the time);
- limits on wall time (from the moment the solution starts), CPU time, address space, file size, open files,
  processes and core dumps; on memory over all its processes, and on disk over all its files;
- a scrubbed environment, stdin at its end, stdout and stderr to /dev/null, no inherited descriptor but its pipes;
- a private directory as working directory, HOME and TMPDIR, removed afterwards;
- with bubblewrap: a file system with nothing in it but the interpreter, its packages (read-only) and that
  directory, and no /proc, which would show paths of the host; no network; process ids of its own, whose every
  process is killed with the first;
- without, where the packages are there: Landlock lets it open the interpreter's files and its own only, seccomp
  refuses sockets, new processes (threads stay), signals to others, and calls that no solution needs.

Not covered:
- the kernel itself: a program that exploits a hole in it escapes;
- side channels (timing, load), and memory and CPU of the machine up to the limits times the workers;
- without bubblewrap: other files' names and sizes (stat), which Landlock leaves open; solutions that start
  processes are refused there and judged wrong, with bubblewrap they may pass;
- with bubblewrap but without pyseccomp: AF_VSOCK, a wider CPU set, and memory in file systems that the program mounts
  in a namespace of its own;
- with neither (run only with --allow-network): what the user may read, write and reach stays reachable, an ordinary
  user's orphaned processes outlive the run, and such a user's program may reach its judge's process.

Linux 5.3 or newer. `dynrank-eval sandbox-check` tries it out.
"""

from dynrank_eval.sandbox.isolation import Isolation, detect, require_network_isolation
from dynrank_eval.sandbox.limits import Limits, Outcome, Program, Result
from dynrank_eval.sandbox.runner import check, run_programs

__all__ = [
    "Isolation",
    "Limits",
    "Outcome",
    "Program",
    "Result",
    "check",
    "detect",
    "require_network_isolation",
    "run_programs",
]
