"""What a figure depends on besides the code: the machine and the versions of the libraries."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
"""Of x86 and Arm: what decides how fast fp32 and bf16 are."""
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "dynrank-ds")


def machine() -> dict[str, Any]:
    """Return the CPU, its features that decide speed, cores, memory, the load of other work, and Python."""
    first: dict[str, str] = {}
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    features = set((first.get("flags") or first.get("Features", "")).split())
    return {
        "cpu": first.get("model name", platform.machine()),
        "family_model_stepping": [first.get(k) for k in ("cpu family", "model", "stepping")],
        "features": [flag for flag in _FLAGS if flag in features],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_MEMINFO.read_text().split()[1]) / 2**20, 1),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the figures depend on."""
    return {package: version(package) for package in _PACKAGES}
