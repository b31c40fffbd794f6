"""What vLLM can serve, and with which settings; without vLLM itself, which takes seconds to import."""

import logging
from pathlib import Path

from dynrank_eval.engines.model import adapter_config, adapter_rank, adapter_ranks, load_config

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
# What vLLM accepts as max_lora_rank; it serves every rank up to it.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

log = logging.getLogger(__name__)


def needs_merging(adapter: Path) -> str | None:
    """Why vLLM cannot serve the adapter directly, None where it can."""
    config = adapter_config(adapter)
    ranks = adapter_ranks(adapter, config)
    if max(ranks) > _LORA_RANKS[-1]:
        return f"its rank {max(ranks)} is above {_LORA_RANKS[-1]}"
    if min(ranks) == 0:
        return "it has modules of rank 0"
    if config.get("use_dora"):
        return "it is weight-decomposed (DoRA)"
    if config.get("modules_to_save"):
        return "it holds whole modules (modules_to_save)"
    if config.get("bias", "none") != "none":
        return f"it trains biases (bias: {config['bias']})"
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.split("_")[0] in _CHANGE_THE_BASE:
        return f"its base is changed first (init_lora_weights: {initial})"
    return None


def allowed_rank(adapter: Path) -> int:
    """The smallest max_lora_rank of vLLM that holds the adapter."""
    rank = adapter_rank(adapter)
    return next(allowed for allowed in _LORA_RANKS if allowed >= rank)


def parallel_size(model: str, gpus: int) -> int:
    """The largest number of GPUs that can share the model's attention heads and its MLP (vLLM splits them evenly)."""
    config = load_config(model)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    wide = getattr(config, "intermediate_size", None) or heads
    sizes = [n for n in range(1, gpus + 1) if heads % n == 0 and wide % n == 0]
    size = max(n for n in sizes if shared % n == 0 or n % shared == 0)
    if size < gpus:
        log.warning("%d of %d GPUs are used: %s has %d attention heads", size, gpus, model, heads)
    return size
