"""The trained triples of a checkpoint, read linear by linear."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dynrank_ds.adapters.linear import Part
from dynrank_ds.adapters.weight_decomposed import BASE_NORMS, MAGNITUDE_OFFSET
from dynrank_ds.checkpoint.files import check_tensors, read_state
from dynrank_ds.checkpoint.initial import IN_STATE, INITIAL_OF, InitialTriples
from dynrank_ds.checkpoint.keys import MASTER, constant_key, factor_key
from dynrank_ds.errors import RunError
from dynrank_ds.tensorfile import TensorFileReader


@dataclass(frozen=True)
class LinearShape:
    """One adapted linear: W x + scale * B^T A x with `rank` triples, those of all its heads where they are modules."""

    rank: int
    scale: float
    in_features: int
    out_features: int
    heads: int
    """Modules that it falls into; 1 for a linear that is one module."""


@dataclass(frozen=True)
class _Module:
    """What state.json says of a module: scale * B^T diag(e g) A with e = 1 or g = 1 where absent."""

    name: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    gate: list[float] | None = None
    """Per triple, the gate that the method keeps outside the triples."""
    part: Part | None = None
    """Which rows or columns of which linear it is, where it is not a linear's whole."""
    initial: tuple[int, ...] = ()
    """Numbers of the initial triples that are subtracted."""


class TrainedAdapter:
    """The fp32 triples of a checkpoint.

    Attributes:
        linears: the shape of every adapted linear by its module name, those of rank 0 too.
        description: what messages call it.
        base_model: folder or hub id of the frozen base.
        base_model_hash: what `model_hash` gave for it; None where the checkpoint does not say.
        recipe: with every default; {} where the checkpoint does not say.
        held_out_loss: of a checkpoint that was kept for it.
        subtracted: how many initial triples each linear subtracts from its triples (PiSSA); {} where none has any.

    Raises:
        RunError: if the checkpoint is missing or damaged, or a PiSSA run lacks its initial triples.
    """

    def __init__(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.base_model: str = state["base_model"]
        self.base_model_hash: str | None = state.get("identity", {}).get("base model")
        self.recipe: dict[str, Any] = state.get("recipe", {})
        self.held_out_loss: float | None = state.get("held_out_loss")
        self.step: int = state["step"]
        self.method: str = state["method"]
        self.description = f"step {self.step}"
        self._modules: dict[str, list[_Module]] = {}
        for name, value in state["blocks"].items():
            module = _module(name, value)
            self._modules.setdefault(module.part.linear if module.part else name, []).append(module)
        self.linears = {name: _linear(modules) for name, modules in self._modules.items()}
        self.subtracted = {
            name: len(modules[0].initial) for name, modules in self._modules.items() if modules[0].initial
        }
        self._path = check_tensors(checkpoint)
        self._file = TensorFileReader(self._path)
        self._initial: InitialTriples | None = None
        if IN_STATE in state:
            self._initial = InitialTriples(checkpoint.parents[1], state[IN_STATE])

    def triples(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (r, in) and diag(e g) B (r, out) of the linear `name`, whose rank must be above 0, in fp32.

        Triples of a head are zero outside its columns in A or its rows in B.

        Raises:
            RunError: for a tensor that is missing, misshapen or not finite.
        """
        pairs = [self._triples(module) for module in self._modules[name] if module.rank]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])

    def factors(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return A (r, in) and B (r, out) as they are trained, without e or gates, in fp32.

        One pair for each module of the linear `name` whose rank is above 0.

        Raises:
            RunError: as `triples`.
        """
        return [self._factors(module) for module in self._modules[name] if module.rank]

    def magnitudes(self, name: str) -> torch.Tensor | None:
        """Return the magnitude of each output row of the linear `name`, (out,) fp32; None where weights are whole.

        Raises:
            RunError: as `triples`.
        """
        shape = (self.linears[name].out_features,)
        offset = factor_key(MASTER, name, MAGNITUDE_OFFSET)
        if offset not in self._file.entries:
            return None
        return self._tensor(constant_key(BASE_NORMS, name), shape) + self._tensor(offset, shape)

    @property
    def weight_decomposed(self) -> bool:
        """Whether its linears have magnitudes."""
        return any(factor_key(MASTER, name, MAGNITUDE_OFFSET) in self._file.entries for name in self.linears)

    def _factors(self, module: _Module) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self._tensor(factor_key(MASTER, module.name, "lora_A"), (module.rank, module.in_features)),
            self._tensor(factor_key(MASTER, module.name, "lora_B"), (module.rank, module.out_features)),
        )

    def subtracted_triples(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A0 (n, in) and diag(e0) B0 (n, out) of a linear of `subtracted`, in fp32."""
        module = self._modules[name][0]
        assert self._initial is not None
        rows = {f: value.float() for f, value in self._initial.rows(name, module.initial).items()}
        gate = rows.get("lora_E")
        return rows["lora_A"], rows["lora_B"] if gate is None else rows["lora_B"] * gate[:, None]

    def _triples(self, module: _Module) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self._factors(module)
        gate = factor_key(MASTER, module.name, "lora_E")
        if gate in self._file.entries:
            b *= self._tensor(gate, (module.rank,))[:, None]
        if module.gate is not None:
            b *= torch.tensor(module.gate)[:, None]
        if module.part is None:
            return a, b
        return (
            (_widened(a, module.part), b) if module.part.side == "columns" else (a, _widened(b, module.part))
        )

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
        if self._initial:
            self._initial.close()


def _module(name: str, value: dict[str, Any]) -> _Module:
    fields = {field: value[field] for field in ("rank", "scale", "in_features", "out_features")}
    part = value.get("part")
    return _Module(
        name,
        **fields,
        gate=value.get("gate"),
        part=Part(**part) if part else None,
        initial=tuple(number for number in value.get(INITIAL_OF, ()) if number is not None),
    )


def _linear(modules: list[_Module]) -> LinearShape:
    """Return the linear that these modules form: one module, or one per head."""
    first = modules[0]
    sides = {"columns": first.in_features, "rows": first.out_features}
    if first.part is not None:
        sides[first.part.side] = first.part.of
    rank = sum(module.rank for module in modules)
    return LinearShape(rank, first.scale, sides["columns"], sides["rows"], len(modules))


def _widened(factor: torch.Tensor, part: Part) -> torch.Tensor:
    """Extend (r, part) to (r, whole) with zeros."""
    return torch.nn.functional.pad(factor, (part.start, part.of - part.stop))
