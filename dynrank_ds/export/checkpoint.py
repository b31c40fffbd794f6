"""The trained triples of a checkpoint, read block by block."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from dynrank_ds.checkpoints import check_tensors, read_state
from dynrank_ds.errors import RunError
from dynrank_ds.tensorfile import TensorFileReader


@dataclass(frozen=True)
class BlockShape:
    """One adapted linear: y = W x + scale * B^T diag(e g) A x with `rank` triples, e = 1 or g = 1 where absent."""

    rank: int
    scale: float
    in_features: int
    out_features: int
    gate: list[float] | None = None
    """Per triple, the gate that the method keeps outside the triples."""


class TrainedAdapter:
    """The fp32 triples of a checkpoint.

    Attributes:
        blocks: the shape of every adapted linear by its module name, those of rank 0 too.
        base_model: folder or hub id of the frozen base.

    Raises:
        RunError: if the checkpoint is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.base_model: str = state["base_model"]
        self.step: int = state["step"]
        self.method: str = state["method"]
        self.blocks = {name: BlockShape(**_shape_fields(value)) for name, value in state["blocks"].items()}
        self._path = check_tensors(checkpoint, state)
        self._file = TensorFileReader(self._path)

    def triples(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and diag(e g) B (r, out) of the block `name`, whose rank must be above 0, in fp32.

        Raises:
            RunError: for a tensor that is missing, misshapen or not finite.
        """
        block = self.blocks[name]
        a = self._tensor(f"master/{name}.lora_A", (block.rank, block.in_features))
        b = self._tensor(f"master/{name}.lora_B", (block.rank, block.out_features))
        if f"master/{name}.lora_E" in self._file.entries:
            b *= self._tensor(f"master/{name}.lora_E", (block.rank,))[:, None]
        if block.gate is not None:
            b *= torch.tensor(block.gate)[:, None]
        return a, b

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        entry = self._file.entries.get(name)
        if entry is None:
            raise RunError(f"{self._path} lacks the tensor {name}, which state.json says it has")
        if entry.shape != shape or entry.dtype != torch.float32:
            raise RunError(
                f"{self._path}: {name} is {entry.dtype} {entry.shape}; state.json says torch.float32 {shape}"
            )
        tensor = self._file.read(name)
        if not torch.isfinite(tensor).all():
            raise RunError(
                f"{self._path}: {name} has values that are not finite: export an earlier checkpoint"
            )
        return tensor

    def __enter__(self) -> "TrainedAdapter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _shape_fields(value: dict) -> dict:
    return {field: value[field] for field in BlockShape.__dataclass_fields__ if field in value}
