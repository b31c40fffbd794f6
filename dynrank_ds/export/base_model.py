"""The frozen base of an adapter: where it lies and which files it has."""

import hashlib
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dynrank_ds import base_weights
from dynrank_ds.base_weights import weight_files
from dynrank_ds.errors import ModelError
from dynrank_ds.files import read_json
from dynrank_ds.hub import is_hub_id
from dynrank_ds.tensorfile import TensorFileReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES, _SAMPLE_BYTES = 64, 4096
# Configuration, tokenizer, chat template, licence: all that a model folder holds besides weights and code.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class BaseModel:
    """A Hugging Face model folder.

    Attributes:
        folder: where it lies.
        shards: the names of its safetensors files.
        companions: the names of the other files that belong to the model.
        tied: whether its output head is its input embedding.
    """

    folder: Path
    shards: list[str]
    companions: list[str]
    tied: bool


def find_base(base: str) -> BaseModel:
    """Return the model at the folder or hub id `base`; a hub id is fetched unless it is cached already.

    Raises:
        ModelError: if there is no such model, or one without safetensors weights or config.json.
    """
    folder = Path(base) if Path(base).is_dir() else _fetch(base)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} has no config.json: name the folder or hub id of a Hugging Face model")
    shards = weight_files(folder)
    companions = {path.name for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    tied = bool(read_json(config).get("tie_word_embeddings"))
    return BaseModel(folder, shards, sorted(companions), tied)


def _fetch(base: str) -> Path:
    if not is_hub_id(base):
        raise ModelError(
            f"The base model {base} is no folder: name an existing folder or a hub id (owner/name)"
        )
    try:
        return Path(snapshot_download(base, allow_patterns=["*.safetensors", *_COMPANIONS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"The base model {base} is no folder here and could not be fetched from the hub ({reason}): "
            "name its folder with --base"
        ) from error


def stored_modules(model: BaseModel, wanted: Collection[str]) -> dict[str, str]:
    """Return the module of each stored tensor, by the name that it has once transformers has loaded it.

    Composite models and old checkpoints are stored under names that transformers changes on loading; its own rules say
    how. They are asked for, which takes a model without weights, only where a module is not found under its own name.
    """
    stored = []
    for shard in model.shards:
        with TensorFileReader(model.folder / shard) as reader:
            stored += list(reader.entries)
    modules = {name: name.removesuffix(".weight") for name in stored}
    if not set(wanted) <= set(modules.values()):
        names = loaded_names(model.folder, stored)
        modules = {name: names[name].removesuffix(".weight") for name in stored}
    return modules


def loaded_names(folder: Path, stored: Sequence[str]) -> dict[str, str]:
    """Return the name that transformers gives to each stored tensor of a model on loading it.

    Raises:
        ModelError: transformers knows no such model.
    """
    model = model_without_weights(folder)
    return {name: loaded.name for name, loaded in base_weights.loaded_names(model, stored).items()}


def model_without_weights(folder: Path, device: str | None = "meta") -> "PreTrainedModel":
    """Return the model of a folder's configuration on the meta device; None is the device of the context.

    Raises:
        ModelError: transformers knows no such model.
    """
    # transformers takes seconds to import, and most merges do not need it.
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Composite models are not among Auto's causal language models.
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device(device) if device else nullcontext():
            model: PreTrainedModel = (
                kind(config)
                if kind
                else transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder} is no model that transformers knows: {reason}") from error
    return model


def model_hash(folder: Path) -> str:
    """Hash config.json, and of every weight file its size and 64 samples of 4 KiB: a 70B model takes a second."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
