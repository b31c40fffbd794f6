"""Which floating-point type a machine computes fast, for training and evaluation alike; imports nothing heavy."""

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Of x86 (the first two) and of Arm."""
SLOW_BF16 = "8 to 40 times slower than fp32"
"""Measured on an AVX2 CPU, one thread: a linear layer of 800 x 576 x 1536 and one of 800 x 4 x 576."""


def native_bf16(device_type: str) -> bool:
    """Return whether a device computes in bf16 at least as fast as in fp32.

    Args:
        device_type: "cpu" or "cuda", as in `torch.device.type`.
    """
    if device_type == "cpu":
        return bool(_BF16_FLAGS & _cpu_flags())
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def resolve_dtype(dtype: str, device_type: str) -> tuple[str, str]:
    """Return the dtype to compute in and one line that says why.

    Args:
        dtype: "auto", or a dtype that is returned as it is ("bf16", "fp32", "fp16").
        device_type: "cpu" or "cuda".

    Returns:
        For "auto" "bf16" where the device computes it natively, else "fp32".
    """
    if dtype != "auto":
        return dtype, f"{dtype}: as asked for"
    if native_bf16(device_type):
        return "bf16", f"bf16: this {_kind(device_type)} computes it natively"
    return "fp32", f"fp32: this {_kind(device_type)} has no bf16 arithmetic"


def slow_dtype_warning(dtype: str, device_type: str) -> str | None:
    """Return a warning where a dtype that was asked for is emulated on the device, else None."""
    if dtype != "bf16" or native_bf16(device_type):
        return None
    return (
        f"bf16 was asked for, but this {_kind(device_type)} has no bf16 arithmetic: a linear layer runs {SLOW_BF16}; "
        "fp32 or auto is faster here"
    )


def _kind(device_type: str) -> str:
    return "CPU" if device_type == "cpu" else "GPU"


def _cpu_flags() -> set[str]:
    """Return the features that the kernel lists for the first CPU; empty where it does not say."""
    if not _CPUINFO.is_file():
        return set()
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
