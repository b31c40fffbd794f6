"""What vLLM can serve, and with which settings; without vLLM itself, which takes seconds to import."""

import logging
from pathlib import Path

from dynrank_ds.errors import MachineError, ModelError
from dynrank_eval.engines.model import adapter_config, adapter_rank, adapter_ranks, load_config

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
# What vLLM 0.32 serves on a CPU (CPUAttentionBackend.get_supported_head_sizes).
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# What vLLM accepts as max_lora_rank; it serves every rank up to it.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

logger = logging.getLogger(__name__)


def check_heads(model: str) -> None:
    """Raise ModelError where vLLM has no attention kernel for the size of the model's heads."""
    config = load_config(model).get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if size is None:
        return
    import torch

    on_gpu = torch.cuda.is_available()
    if size % 8 if on_gpu else size not in _CPU_HEAD_SIZES:
        allowed = "a multiple of 8" if on_gpu else f"one of {', '.join(map(str, _CPU_HEAD_SIZES))}"
        raise ModelError(
            f"--model {model} has attention heads of size {size}, which vLLM cannot serve on this device (it must be "
            f"{allowed}); use --engine hf."
        )


def check_batch_invariance(engine: str) -> None:
    """Raise MachineError where results depend on the batch all the same: only vLLM on a GPU has other kernels."""
    import torch

    if engine != "vllm" or not torch.cuda.is_available():
        here = f"--engine {engine} has none" if engine != "vllm" else "this machine has no GPU"
        raise MachineError(
            f"--batch-invariant needs kernels that only vLLM has, on a GPU, and {here}; leave the option out."
        )


def needs_merging(adapter: Path) -> str | None:
    """Return why vLLM cannot serve the adapter directly; None where it can."""
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
    """Return the smallest max_lora_rank of vLLM that the adapter fits."""
    rank = adapter_rank(adapter)
    return next(allowed for allowed in _LORA_RANKS if allowed >= rank)


def parallel_size(model: str, gpus: int) -> int:
    """Return the largest number of GPUs over which vLLM can split the model's heads and its MLP evenly."""
    config = load_config(model)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    wide = getattr(config, "intermediate_size", None) or heads
    sizes = [n for n in range(1, gpus + 1) if heads % n == 0 and wide % n == 0]
    size = max(n for n in sizes if shared % n == 0 or n % shared == 0)
    if size < gpus:
        logger.warning("%d of %d GPUs are used: %s has %d attention heads", size, gpus, model, heads)
    return size
