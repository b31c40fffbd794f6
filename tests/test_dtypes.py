"""Which dtype `auto` means on a machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynrank_ds import dtypes


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(dtypes, "_CPUINFO", path)
    return path


@pytest.mark.parametrize(
    ("line", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx avx2 fma", False),
        ("model name\t: avx512_bf16", False),
    ],
)
def test_auto_is_bf16_only_where_the_cpu_lists_bf16_arithmetic(
    line: str, native: bool, cpuinfo: Path
) -> None:
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    assert dtypes.native_bf16("cpu") is native
    name, reason = dtypes.resolve_dtype("auto", "cpu")
    assert name == ("bf16" if native else "fp32") and reason.startswith(name) and "CPU" in reason
    assert (dtypes.slow_dtype_warning("bf16", "cpu") is None) is native


def test_a_dtype_that_was_asked_for_is_kept_and_slow_bf16_is_warned_about(cpuinfo: Path) -> None:
    assert not dtypes.native_bf16("cpu"), "a machine without /proc/cpuinfo has no known bf16 arithmetic"
    assert dtypes.resolve_dtype("bf16", "cpu") == ("bf16", "bf16: as asked for")
    warning = dtypes.slow_dtype_warning("bf16", "cpu")
    assert warning is not None and "8 to 40 times slower" in warning
    assert dtypes.slow_dtype_warning("fp32", "cpu") is None


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked_without_counting_emulation(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert dtypes.resolve_dtype("auto", "cuda")[0] == ("bf16" if native else "fp32")


def test_asking_about_a_cpu_does_not_import_torch() -> None:
    script = "import sys; from dynrank_ds.dtypes import resolve_dtype; resolve_dtype('auto', 'cpu'); "
    done = subprocess.run([sys.executable, "-c", script + "sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0
