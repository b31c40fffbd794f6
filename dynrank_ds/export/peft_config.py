"""adapter_config.json of a PEFT LoRA adapter: ranks, scales and targets by PEFT's rules."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import RunError
from dynrank_ds.files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Settings that make the adapted layer something else than W x + s B A x, with or without magnitudes.
_REFUSED = {
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
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter; what the file leaves out has PEFT's default."""

    path: Path
    values: dict[str, Any]

    @property
    def base_model(self) -> str | None:
        """Folder or hub id of the base that the adapter names, if it does."""
        return self.values.get("base_model_name_or_path")

    def rank(self, module: str) -> int:
        """Return the rank of the module of this full name."""
        return int(_by_pattern(self.values.get("rank_pattern"), module, self.values.get("r", 8)))

    def scale(self, module: str) -> float:
        """Return s in W x + s B A x."""
        alpha = _by_pattern(self.values.get("alpha_pattern"), module, self.values.get("lora_alpha", 8))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def is_target(self, module: str) -> bool:
        """Return whether PEFT puts an adapter beside the linear layer of this full name."""
        targets, excluded = self.values.get("target_modules"), self.values.get("exclude_modules")
        if excluded and _is_named(module, excluded):
            return False
        if targets != "all-linear" and not _is_named(module, targets or ()):
            return False
        layers = self.values.get("layers_to_transform")
        if layers is None:
            return True
        number = re.match(r".*\.[^.]*\.(\d+)\.", module)
        return number is not None and int(number[1]) in (layers if isinstance(layers, list) else [layers])

    @property
    def weight_decomposed(self) -> bool:
        """Whether the rows of W + s B A are scaled to magnitudes of the adapter's own (DoRA)."""
        return bool(self.values.get("use_dora"))

    def refuse_unless_plain(self) -> None:
        """Refuse settings under which a layer's weight is not W + s B A with the base's own W, magnitudes aside.

        Raises:
            RunError: naming the setting.
        """
        if self.values.get("bias", "none") != "none":
            raise RunError(
                f"{self.path}: bias is {self.values['bias']!r}; only adapters without trained biases are read"
            )
        for key, kind in _REFUSED.items():
            if self.values.get(key):
                raise RunError(
                    f"{self.path}: {key} is set; an adapter that is {kind} cannot be used here, only plain LoRA"
                )
        init = self.values.get("init_lora_weights")
        if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
            raise RunError(
                f"{self.path}: init_lora_weights is {init!r}, so the adapter belongs to changed base weights; "
                "convert it with PEFT's path_initial_model_for_weight_conversion first"
            )


def read_config(folder: Path) -> AdapterConfig:
    """Return the configuration of the adapter in `folder`.

    Raises:
        RunError: there is none, it is damaged, or it is not of a LoRA adapter.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{path} does not exist: name the folder of a PEFT adapter")
    values = read_json(path)
    if not isinstance(values, dict):
        raise RunError(f"{path} holds {type(values).__name__}, not an object of settings")
    if values.get("peft_type") != "LORA":
        raise RunError(f"{path}: peft_type is {values.get('peft_type')!r}; only LORA adapters are read")
    for key in _PATTERNS:
        _check_pattern(path, key, values.get(key))
    _check_number(path, "r", values.get("r", 8))
    _check_number(path, "lora_alpha", values.get("lora_alpha", 8))
    return AdapterConfig(path, values)


def _check_pattern(path: Path, key: str, pattern: Any) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        raise RunError(f"{path}: {key} is {pattern!r}, not an object of numbers by module name")
    for module, value in pattern.items():
        _check_number(path, f"{key} of {module}", value)
        try:
            re.compile(module)
        except re.error as error:
            raise RunError(
                f"{path}: {key} has the key {module!r}, no regular expression ({error})"
            ) from error


def _check_number(path: Path, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise RunError(f"{path}: {key} is {value!r}, not a positive number")


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    """Return the value for `module` by PEFT's rule: the first key that matches the name or a dotted suffix of it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _is_named(module: str, names: Any) -> bool:
    """Whether a regular expression matches the whole name, or a list holds it or a dotted end of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
