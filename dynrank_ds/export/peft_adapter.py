"""PEFT LoRA adapters, written by this package or by PEFT, read module by module."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from dynrank_ds.errors import RunError
from dynrank_ds.export.peft_config import CONFIG, WEIGHTS, read_config
from dynrank_ds.tensorfile import TensorFileReader

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.weight)?")


def factor_key(module: str, side: str) -> str:
    """Return PEFT's name of the factor `side` ("A" or "B") of the module `module`."""
    return f"base_model.model.{module}.lora_{side}.weight"


def module_of(key: str) -> str | None:
    """Return the module that a tensor is a LoRA factor of, by PEFT's name of the tensor; None for any other."""
    match = _KEY.fullmatch(key)
    return match and match["module"]


def magnitude_key(module: str) -> str:
    """Return PEFT's name of the magnitudes of the module `module`."""
    return f"base_model.model.{module}.lora_magnitude_vector"


def module_of_magnitude(key: str) -> str | None:
    """Return the module that a tensor has the magnitudes of, by PEFT's name of the tensor; None for any other."""
    match = _MAGNITUDE.fullmatch(key)
    return match and match["module"]


def open_weights(folder: Path) -> TensorFileReader:
    """Return the adapter's tensors.

    Raises:
        RunError: there is no safetensors file.
        TensorFileError: it is damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise RunError(f"{path} does not exist: adapters are read from safetensors files only")
    return TensorFileReader(path)


@dataclass(frozen=True)
class Update:
    """W becomes W + scale * b @ a, with a (r, in) and b (out, r) in fp32; rows are scaled where magnitudes say so."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class PeftAdapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    Attributes:
        config: its settings.
        modules: (out, in) of every adapted module, by its full name.
        ranks: their ranks.
        dtype: of the factors, the widest of them.

    Raises:
        RunError: if the folder holds no such adapter, or one that is neither plain LoRA nor DoRA on linear layers.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / WEIGHTS
        self.config = read_config(folder)
        self.config.refuse_unless_plain()
        self._file = open_weights(folder)
        self.modules = {name: self._shape(name) for name in self._module_names()}
        if not self.modules:
            raise RunError(f"{self._path} holds no LoRA tensors")
        self._magnitudes = self._magnitude_keys()
        self.ranks = {name: self.config.rank(name) for name in self.modules}
        self.dtype = max(
            (self._file.entries[factor_key(name, side)].dtype for name in self.modules for side in "AB"),
            key=lambda dtype: dtype.itemsize,
        )

    @property
    def base_model(self) -> str | None:
        """Folder or hub id of the base that the adapter names, if it does."""
        return self.config.base_model

    def update(self, module: str) -> Update:
        """Return what the adapter adds to the weight of `module`.

        Raises:
            RunError: for values that are not finite.
        """
        a, b = (self._finite(factor_key(module, side)).float() for side in "AB")
        return Update(a, b, self.config.scale(module))

    @property
    def weight_decomposed(self) -> bool:
        """Whether its modules have magnitudes (DoRA)."""
        return self.config.weight_decomposed

    def magnitudes(self, module: str) -> torch.Tensor:
        """Return what the rows of W + dW are scaled to, (out,) fp32, of a module of a weight-decomposed adapter.

        Raises:
            RunError: for values that are not finite.
        """
        return self._finite(self._magnitudes[module]).float()

    def _magnitude_keys(self) -> dict[str, str]:
        """Return the tensor of every module's magnitudes; {} where it is not weight-decomposed."""
        if not self.weight_decomposed:
            return {}
        found = {module_of_magnitude(key): key for key in self._file.entries}
        for name, (out_features, _) in self.modules.items():
            if name not in found:
                raise RunError(f"{self._path} has no magnitudes of {name}, but {CONFIG} says use_dora")
            shape = self._file.entries[found[name]].shape
            if shape != (out_features,):
                raise RunError(f"{self._path}: {found[name]} is {shape}, not ({out_features},)")
        return {name: found[name] for name in self.modules}

    def _module_names(self) -> list[str]:
        names: dict[str, None] = {}
        for key, entry in self._file.entries.items():
            if self.weight_decomposed and module_of_magnitude(key):
                continue
            module = module_of(key)
            if not module:
                raise RunError(f"{self._path} holds {key}, which is no LoRA factor of a linear layer")
            if not entry.dtype.is_floating_point:
                raise RunError(f"{self._path}: {key} is stored as {entry.dtype}, not as floating point")
            names[module] = None
        return list(names)

    def _shape(self, module: str) -> tuple[int, int]:
        a, b = (self._file.entries.get(factor_key(module, side)) for side in "AB")
        if a is None or b is None:
            raise RunError(f"{self._path} holds only one of lora_A and lora_B of {module}")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
            raise RunError(
                f"{self._path}: lora_A {a.shape} and lora_B {b.shape} of {module} do not fit together"
            )
        rank = self.config.rank(module)
        if rank != a.shape[0]:
            raise RunError(f"{self._path}: {module} has rank {a.shape[0]}, but {CONFIG} says {rank}")
        return b.shape[0], a.shape[1]

    def _finite(self, key: str) -> torch.Tensor:
        tensor = self._file.read(key)
        if not torch.isfinite(tensor).all():
            raise RunError(f"{self._path}: {key} has values that are not finite")
        return tensor

    def __enter__(self) -> "PeftAdapter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
