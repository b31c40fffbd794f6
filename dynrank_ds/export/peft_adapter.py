"""PEFT LoRA adapters, written by this package or by PEFT, read module by module."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dynrank_ds.errors import RunError
from dynrank_ds.export.adapter_formats import CONFIG, WEIGHTS, factor_key
from dynrank_ds.files import read_json
from dynrank_ds.tensorfile import TensorFileReader

# Settings that make the adapted layer something else than W x + (alpha / r) B A x.
_REFUSED = {
    "use_dora": "weight-decomposed (DoRA)",
    "modules_to_save": "accompanied by fully trained modules",
    "lora_bias": "one with biases",
    "fan_in_fan_out": "for transposed weights",
    "layer_replication": "for replicated layers",
    "target_parameters": "for bare parameters",
    "trainable_token_indices": "accompanied by trained token embeddings",
    "alora_invocation_tokens": "active for some tokens only (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "module-diagonal",
    "arrow_config": "a mixture (Arrow)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Of PEFT's initial values named by a string, those that leave the base's weights as they are.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")


@dataclass(frozen=True)
class Update:
    """W becomes W + scale * b @ a, with a (r, in) and b (out, r) in fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class PeftAdapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    Attributes:
        modules: (out, in) of every adapted module, by its full name.
        base_model: the base that the adapter names, if it does.

    Raises:
        RunError: if the folder holds no such adapter, or one that is not plain LoRA on linear layers.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / WEIGHTS
        self._config = _read_config(folder)
        self.base_model: str | None = self._config.get("base_model_name_or_path")
        if not self._path.is_file():
            raise RunError(f"{self._path} does not exist: adapters are read from safetensors files only")
        self._file = TensorFileReader(self._path)
        self.modules = {name: self._shape(name) for name in self._module_names()}
        if not self.modules:
            raise RunError(f"{self._path} holds no LoRA tensors")

    def update(self, module: str) -> Update:
        """What the adapter adds to the weight of `module`.

        Raises:
            RunError: for values that are not finite.
        """
        a, b = (self._finite(factor_key(module, side)).float() for side in "AB")
        rank = a.shape[0]
        alpha = _by_pattern(self._config.get("alpha_pattern"), module, self._config["lora_alpha"])
        divisor = math.sqrt(rank) if self._config.get("use_rslora") else rank
        return Update(a, b, alpha / divisor)

    def _module_names(self) -> list[str]:
        names: dict[str, None] = {}
        for key in self._file.entries:
            match = _KEY.fullmatch(key)
            if not match:
                raise RunError(f"{self._path} holds {key}, which is no LoRA factor of a linear layer")
            names[match["module"]] = None
        return list(names)

    def _shape(self, module: str) -> tuple[int, int]:
        a, b = (self._file.entries.get(factor_key(module, side)) for side in "AB")
        if a is None or b is None:
            raise RunError(f"{self._path} holds only one of lora_A and lora_B of {module}")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise RunError(
                f"{self._path}: lora_A {a.shape} and lora_B {b.shape} of {module} do not fit together"
            )
        rank = _by_pattern(self._config.get("rank_pattern"), module, self._config["r"])
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{path} does not exist: name the folder of a PEFT adapter")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise RunError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be merged")
    if config.get("bias", "none") != "none":
        raise RunError(
            f"{path}: bias is {config['bias']!r}; only adapters without trained biases can be merged"
        )
    for key, kind in _REFUSED.items():
        if config.get(key):
            raise RunError(
                f"{path}: {key} is set; an adapter that is {kind} cannot be merged here, only plain LoRA"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise RunError(
            f"{path}: init_lora_weights is {init!r}, so the adapter belongs to changed base weights; "
            "convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    return config


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    """The value for `module` by PEFT's rule: the first key that matches the name or a dotted suffix of it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
