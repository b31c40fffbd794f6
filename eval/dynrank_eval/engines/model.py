"""The model to be scored: checks before anything is loaded, its tokenizer, its prompts as token ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrank_ds.errors import DataError, ModelError, RunError
from dynrank_ds.hub import is_hub_id

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class ModelSpec:
    """What an engine loads.

    Attributes:
        model: folder or hub id.
        adapter: folder of a PEFT adapter, or None.
        dtype: "bf16", "fp16" or "fp32".
        max_length: tokens of the longest prompt plus those of its completion.
        probe: prompts on which an adapter must change the output; without any that is not checked.
        batch_invariant: whether vLLM uses kernels whose results do not depend on the batch.
        engines: number of engines that share the prompts.
    """

    model: str
    adapter: Path | None
    dtype: str
    max_length: int
    probe: tuple[tuple[int, ...], ...] = ()
    batch_invariant: bool = False
    engines: int = 1

    @property
    def torch_dtype(self) -> str:
        """Return the dtype as torch and vLLM name it."""
        return TORCH_DTYPES[self.dtype]


def check_model(model: str) -> None:
    """Raise ModelError unless `model` is a complete model folder or may be a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(model):
            raise ModelError(f"--model {model}: there is no such folder.")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"--model {model}: the folder has no config.json, so it is no Hugging Face model.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"--model {model}: the folder has no tokenizer file ({', '.join(_TOKENIZER_FILES)}); "
            "copy the base model's."
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"--model {model}: the folder has no *.safetensors weights (others are not loaded).")


def adapter_rank(adapter: Path) -> int:
    """Return the largest rank in a PEFT LoRA adapter's folder; RunError where that is none."""
    return max(adapter_ranks(adapter, adapter_config(adapter)))


def adapter_config(adapter: Path) -> dict[str, Any]:
    """Return adapter_config.json of a complete PEFT adapter's folder; RunError where that is none."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise RunError(
            f"--adapter {adapter}: the folder has no adapter_config.json, so it is no PEFT adapter."
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"--adapter {adapter}: the folder has no adapter_model.safetensors.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is no JSON object: {error}.") from error


def adapter_ranks(adapter: Path, config: dict[str, Any]) -> list[int]:
    """Return every rank that the configuration in the folder `adapter` names; RunError where it is damaged."""
    try:
        return [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{adapter}/adapter_config.json has no readable rank r and rank_pattern: {error!r}."
        ) from error


def model_files(folder: str) -> list[list[Any]]:
    """Return name, size and modification time of the files that decide what a folder generates; none of a hub id."""
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.json")])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a folder or hub id; ModelError where it cannot be loaded."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model, "tokenizer")


def load_config(model: str) -> Any:
    """Return the configuration of a folder or hub id; ModelError where it cannot be loaded."""
    from transformers import AutoConfig

    return _load(AutoConfig, model, "configuration")


def _load(kind: Any, model: str, what: str) -> Any:
    try:
        return kind.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"--model {model}: its {what} cannot be loaded: {first}") from error


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return token ids with one BOS where the tokenizer prepends one, and without the EOS that some append.

    A prompt whose text begins with the BOS token does not get a second one.
    """
    encoded = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]
        if not ids:
            raise DataError("a prompt without a single token cannot be completed.")
        encoded.append(ids)
    return encoded


def check_length(model: str, max_length: int) -> None:
    """Raise ModelError where prompt and completion exceed the model's positions."""
    positions = getattr(load_config(model), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ModelError(
            f"--model {model} has {positions} positions, but the longest prompt with its completion needs "
            f"{max_length}; lower --max-new-tokens."
        )


def end_token_ids(model: str, tokenizer: Any) -> list[int]:
    """Return every token that ends a text: the tokenizer's EOS and those of the model's generation settings."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        # A model without generation_config.json: base models often have none.
        configured = None
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})
