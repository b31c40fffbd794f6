"""safetensors files written and read one tensor at a time.

The safetensors library writes a file from a dictionary of all tensors and reads by mapping the whole file,
whose pages then count as the process's memory. Here one tensor at a time is held, in both directions, so that
a model far larger than the memory can be rewritten.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dynrank_ds.errors import DynrankError
from dynrank_ds.shared_disk import patiently

_NAME_OF_DTYPE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_OF_NAME = {name: dtype for dtype, name in _NAME_OF_DTYPE.items()}
_LENGTH_BYTES = 8
_PIECE_BYTES = 2**22
_LARGEST_HEADER = 100_000_000  # the safetensors library's own bound


class TensorFileError(DynrankError):
    """A safetensors file that is missing, cut short or malformed."""


@dataclass(frozen=True)
class TensorEntry:
    """What a file says about one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """Writes a safetensors file whose tensors are announced first and then given in any order.

    The file keeps the announced order, wider dtypes first: every tensor then starts at a multiple of its
    element size, as in the files of the safetensors library. Closing flushes to the disk; leaving the context
    by an exception removes the file.

    Args:
        path: the file to write; an existing one is replaced.
        entries: name, dtype and shape of every tensor.
        metadata: free strings for the header, besides `format: pt`, which transformers asks for.

    Raises:
        ValueError: for a name announced twice or an announced tensor without elements; from `write`, for a
            tensor that was not announced, was written before, or differs from its announcement; from `close`,
            for tensors that were never written.
    """

    def __init__(
        self, path: Path | str, entries: Sequence[TensorEntry], metadata: dict[str, str] | None = None
    ) -> None:
        self._path = Path(path)
        self._pending = {entry.name: entry for entry in entries}
        if len(self._pending) != len(entries):
            raise ValueError(f"{path}: a tensor name was announced twice")
        for entry in entries:
            if entry.nbytes == 0:
                raise ValueError(f"{path}: tensor {entry.name} of shape {entry.shape} has no elements")
        header, self._offsets = _layout(entries, metadata or {})
        self._file = self._path.open("wb")
        self._file.write(header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put the announced tensor `name`, on any device, into the file."""
        entry = self._pending.get(name)
        if entry is None:
            raise ValueError(f"{self._path}: tensor {name} was not announced or is already written")
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{self._path}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"announced was {entry.dtype} {entry.shape}"
            )
        self._file.seek(self._offsets[name])
        self._file.write(_bytes_of(tensor.detach().cpu().contiguous()))
        del self._pending[name]

    def copy(self, name: str, reader: "TensorFileReader") -> None:
        """Put the announced tensor `name` of another file into this one, through a small buffer."""
        entry = self._pending.get(name)
        if entry is None or reader.entries[name] != entry:
            raise ValueError(
                f"{self._path}: tensor {name} was not announced like that, or is already written"
            )
        self._file.seek(self._offsets[name])
        for piece in reader.pieces(name):
            self._file.write(piece)
        del self._pending[name]

    def close(self) -> None:
        """Finish the file and wait until the disk has it."""
        if self._pending:
            example = next(iter(self._pending))
            raise ValueError(f"{self._path}: {len(self._pending)} tensors were never written, e.g. {example}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if not self._file.closed:
                self._file.close()
                self._path.unlink()


class TensorFileReader:
    """Reads a safetensors file tensor by tensor, without mapping it.

    Attributes:
        entries: what the file holds, by name, in the order of the bytes.
        metadata: the header's free strings.

    Raises:
        TensorFileError: if the file is missing, cut short, malformed, or holds a dtype unknown here.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._is_stale = False
        try:
            self._file, text, size = patiently(self._open, path)
        except OSError as error:
            raise TensorFileError(f"{path} cannot be read ({error.strerror})") from error
        try:
            self._read_entries(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._file.close()
            raise TensorFileError(f"{path} is not a readable safetensors file ({error!r})") from error
        needed = max((self._offsets[e.name] + e.nbytes for e in self.entries.values()), default=0)
        if size < needed:
            self._file.close()
            raise TensorFileError(f"{self._path} is cut short: {size} bytes of {needed}")

    def _open(self) -> tuple[BufferedReader, bytes, int]:
        """Return the file, its header and its length."""
        file = self._path.open("rb")
        try:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _LARGEST_HEADER:
                raise TensorFileError(
                    f"{self._path} is not a readable safetensors file (a header of {length} bytes)"
                )
            return file, file.read(length), self._path.stat().st_size
        except (OSError, TensorFileError):
            file.close()
            raise

    def _read_entries(self, text: bytes) -> None:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        start = _LENGTH_BYTES + len(text)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        self.entries = {
            name: TensorEntry(name, _DTYPE_OF_NAME[value["dtype"]], tuple(value["shape"]))
            for name, value in ordered
        }
        self._offsets = {name: start + value["data_offsets"][0] for name, value in ordered}
        for name, value in ordered:
            begin, end = value["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (begin, end, *value["shape"])):
                raise ValueError(f"{name} has a place or a shape that is no number from 0 on")
            if begin + self.entries[name].nbytes != end:
                raise ValueError(f"{name} has {end - begin} bytes instead of {self.entries[name].nbytes}")

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name` in memory of its own, on the CPU.

        Raises:
            TensorFileError: if there is none, here as below, or if the file was cut short since it was opened.
        """
        entry = self._entry(name)
        return self.read_part(name, 0, math.prod(entry.shape)).view(entry.shape)

    def read_part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements start to stop of `name` in row-major order, (stop - start,); nothing else is read."""
        tensor = torch.empty(stop - start, dtype=self._entry(name).dtype)
        self.read_into(name, start, tensor)
        return tensor

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out`, (n,) contiguous on the CPU in the tensor's dtype, with its elements [start, start + n)."""
        dtype = self._entry(name).dtype
        if out.dtype != dtype:
            raise ValueError(f"{self._path}: {name} is {dtype}, not {out.dtype}")
        place, content = self._offsets[name] + start * dtype.itemsize, _bytes_of(out)
        read = patiently(lambda: self._read_at(place, content), self._path)
        if read != out.numel() * dtype.itemsize:
            raise TensorFileError(f"{self._path} was cut short while {name} was read")

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise TensorFileError(f"{self._path} has no tensor {name}")
        return self.entries[name]

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of the tensor `name`, in pieces that are valid until the next one."""
        place = self._offsets[name]
        end = place + self.entries[name].nbytes
        buffer = memoryview(bytearray(min(end - place, _PIECE_BYTES)))
        while place < end:
            piece = buffer[: min(end - place, len(buffer))]
            patiently(partial(self._read_at, place, piece), self._path)
            yield piece
            place += len(piece)

    def _read_at(self, place: int, out: memoryview) -> int:
        """Fill `out` with the bytes from `place` on; return how many there are."""
        if self._is_stale:
            self._file.close()
            self._file, self._is_stale = self._path.open("rb"), False
        try:
            self._file.seek(place)
            return self._file.readinto(out)
        except OSError:
            self._is_stale = True  # a shared disk that is there again may not know this handle any more
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "TensorFileReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _layout(entries: Iterable[TensorEntry], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the file's head, and where each tensor's bytes begin in the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | metadata}
    relative: dict[str, int] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        relative[entry.name] = end
        end += entry.nbytes
        header[entry.name] = {
            "dtype": _NAME_OF_DTYPE[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [relative[entry.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return head, {name: len(head) + offset for name, offset in relative.items()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a tensor is listed twice")
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
