"""Generation with transformers, for small machines and as the reference for other engines."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dynrank_ds.errors import ModelError
from dynrank_eval.engines import Completion, Request, require_difference
from dynrank_eval.engines.model import ModelSpec, end_token_ids, load_tokenizer

_BATCH = 16


class HfEngine:
    """Generates in batches of 16 of similar length, padded on the left."""

    def __init__(self, spec: ModelSpec) -> None:
        self._tokenizer = load_tokenizer(spec.model)
        self._end = end_token_ids(spec.model, self._tokenizer)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_adapted(spec).to(self._device).eval()
        if spec.adapter is not None and spec.probe:
            check_difference(spec, self._model)
        # The model's own settings (penalties, sampling) would fill what a call leaves open.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        # The longest first, so that memory runs out at once if it does; alike in the rest, to share a batch.
        order = sorted(
            range(len(requests)),
            key=lambda place: (
                requests[place].stop,
                requests[place].max_new_tokens,
                -len(requests[place].prompt),
            ),
        )
        tokens = 0
        with tqdm(total=len(requests), desc="generating", unit="prompt") as bar:
            for places in _batches(order, requests):
                batch = self._batch([requests[place] for place in places])
                tokens += sum(completion.n_tokens for completion in batch)
                bar.update(len(places))
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
                yield from zip(places, batch, strict=True)

    def _batch(self, requests: Sequence[Request]) -> list[Completion]:
        prompts = [request.prompt for request in requests]
        stop = requests[0].stop
        width = max(map(len, prompts))
        pad = self._end[0] if self._end else 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        stopper = _StopStrings(self, prompts, width, stop)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=requests[0].max_new_tokens,
            eos_token_id=self._end or None,
            pad_token_id=pad,
        )
        drawn = any(request.temperature for request in requests)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([stopper]),
                logits_processor=LogitsProcessorList([_Draws(requests)] if drawn else []),
            )
        rows = output[:, width:].tolist()
        return [
            self._completion(request, row, end)
            for request, row, end in zip(requests, rows, stopper.ends, strict=True)
        ]

    def _completion(self, request: Request, row: list[int], stopped: int | None) -> Completion:
        ends = [place + 1 for place, token in enumerate(row) if token in self._end]
        ended = [*ends[:1], *([stopped] if stopped else [])]
        generated = row[: min([*ended, len(row)])]
        text = self.text_after(request.prompt, generated)
        cuts = [place for stop in request.stop if (place := text.find(stop)) >= 0]
        return Completion(text[: min(cuts)] if cuts else text, tuple(generated), not ended and not cuts)

    def text_after(self, prompt: list[int], generated: list[int]) -> str:
        """Return the generated text as a continuation: alone, SentencePiece would lose its leading space."""

        def decode(ids: list[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        return decode(prompt + generated)[len(decode(prompt)) :]


class _StopStrings(StoppingCriteria):
    """Ends a row when its generated text holds a stop string; `ends` keeps the length at which it did.

    transformers' own `stop_strings` looks at the tokens alone and does not say where a row ended, and a tokenizer whose
    first token loses its space (SentencePiece) gives another text there than the whole completion has.
    """

    def __init__(self, engine: HfEngine, prompts: list[list[int]], width: int, stop: Sequence[str]) -> None:
        self._engine, self._prompts, self._width, self._stop = engine, prompts, width, stop
        self.ends: list[int | None] = [None] * len(prompts)
        # Every token holds at least a byte: the last so many reach back to a stop string's beginning.
        self._window = max((len(s.encode()) for s in stop), default=0) + 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        rows = input_ids[:, self._width :].tolist()
        for place, row in enumerate(rows):
            if self.ends[place] is None and self._holds_stop(self._prompts[place], row):
                self.ends[place] = len(row)
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

    def _holds_stop(self, prompt: list[int], row: list[int]) -> bool:
        recent = row[-self._window :]
        before = (prompt + row[: len(row) - len(recent)])[-self._window :]
        text = self._engine.text_after(before, recent)
        return any(s in text for s in self._stop)


class _Draws(LogitsProcessor):
    """Sampling as an argmax: Gumbel noise from each row's own generator (Gumbel 1954) on the scaled logits.

    So a request draws the same whatever shares its batch.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._settings = [(request.temperature, request.top_p) for request in requests]
        self._generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = scores.float()
        for row, ((temperature, top_p), generator) in enumerate(
            zip(self._settings, self._generators, strict=True)
        ):
            if temperature:
                scaled = _within_top_p(drawn[row] / temperature, top_p)
                uniform = torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64)
                gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
                drawn[row] = scaled + gumbel.to(drawn)
        return drawn


def _within_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return logits (vocabulary,) with -inf for tokens outside the smallest set that holds `top_p` (Holtzman 2020)."""
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    kept = torch.full_like(logits, float("-inf"))
    inside = before < top_p
    kept[places[inside]] = ordered[inside]
    return kept


def _batches(order: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
    """Yield at most 16 places at a time, whose requests agree in length and stop strings."""
    batch: list[int] = []
    for place in order:
        new, first = requests[place], requests[batch[0]] if batch else None
        if first and (
            len(batch) == _BATCH or (new.stop, new.max_new_tokens) != (first.stop, first.max_new_tokens)
        ):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def load_adapted(spec: ModelSpec) -> Any:
    """Return the model, with the adapter on it where there is one; ModelError where it cannot be loaded."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            spec.model,
            dtype=getattr(torch, spec.torch_dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"--model {spec.model} cannot be loaded: {first}") from error
    if spec.adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(spec.adapter), use_safetensors=True)


def check_difference(spec: ModelSpec, model: Any) -> None:
    """Raise RunError where the adapter of a PEFT model changes none of the probe's next-token logits."""
    adapted = [_next_logprobs(model, prompt) for prompt in spec.probe]
    with model.disable_adapter():
        base = [_next_logprobs(model, prompt) for prompt in spec.probe]
    require_difference(spec, base, adapted)


def _next_logprobs(model: Any, prompt: Sequence[int]) -> Mapping[int, float]:
    with torch.inference_mode():
        logits = model(torch.tensor([list(prompt)], device=model.device)).logits[0, -1].float()
    values, tokens = torch.log_softmax(logits, dim=-1).topk(5)
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))


def save_merged(spec: ModelSpec, folder: Path) -> None:
    """Write the merged model and its tokenizer; the whole model is in memory while it does."""
    model = load_adapted(spec).eval()
    if spec.probe:
        check_difference(spec, model)
    model.merge_and_unload().save_pretrained(folder)
    load_tokenizer(spec.model).save_pretrained(folder)
