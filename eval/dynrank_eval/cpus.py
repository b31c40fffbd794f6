"""How many CPUs this process may use."""

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus() -> int:
    """Count them: under a batch system or in a container fewer than the machine has (affinity, the cgroup's quota)."""
    cpus = len(os.sched_getaffinity(0))
    if _QUOTA.is_file():
        quota, period = _QUOTA.read_text().split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(1, cpus)
