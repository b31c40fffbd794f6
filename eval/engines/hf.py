"""Generation with transformers, for small machines and as the reference for other engines."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from dynrank_ds.errors import ModelError
from dynrank_eval.engines import Completion
from dynrank_eval.engines.model import ModelSpec, end_token_ids, load_tokenizer

_BATCH = 16


class HfEngine:
    """Batches of 16 of similar length, padded on the left."""

    def __init__(self, spec: ModelSpec) -> None:
        self._tokenizer = load_tokenizer(spec.model)
        self._end = end_token_ids(spec.model, self._tokenizer)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                spec.model, dtype=getattr(torch, spec.dtype), use_safetensors=True
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"--model {spec.model} cannot be loaded: {first}") from error
        if spec.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(spec.adapter), use_safetensors=True)
        self._model = model.to(self._device).eval()
        # The model's own settings (penalties, sampling) would fill what a call leaves open.
        self._model.generation_config = GenerationConfig()

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Completion]:
        # The longest first, so that memory runs out at once if it does.
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        completions: dict[int, Completion] = {}
        tokens = 0
        with tqdm(total=len(prompts), desc="generating", unit="prompt") as bar:
            for start in range(0, len(order), _BATCH):
                places = order[start : start + _BATCH]
                batch = self._batch([prompts[place] for place in places], max_new_tokens, stop)
                completions.update(zip(places, batch, strict=True))
                tokens += sum(completion.n_tokens for completion in batch)
                bar.update(len(places))
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
        return [completions[place] for place in range(len(prompts))]

    def _batch(self, prompts: list[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[Completion]:
        width = max(map(len, prompts))
        pad = self._end[0] if self._end else 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        stopper = _StopStrings(self, prompts, width, stop)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._end or None,
            pad_token_id=pad,
        )
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([stopper]),
            )
        rows = output[:, width:].tolist()
        return [
            self._completion(p, row, end, stop)
            for p, row, end in zip(prompts, rows, stopper.ends, strict=True)
        ]

    def _completion(
        self, prompt: list[int], row: list[int], stopped: int | None, stop: Sequence[str]
    ) -> Completion:
        ends = [place + 1 for place, token in enumerate(row) if token in self._end]
        generated = row[: min([*ends[:1], *([stopped] if stopped else []), len(row)])]
        text = self.text_after(prompt, generated)
        cuts = [place for s in stop if (place := text.find(s)) >= 0]
        return Completion(text[: min(cuts)] if cuts else text, tuple(generated))

    def text_after(self, prompt: list[int], generated: list[int]) -> str:
        """The generated text as a continuation: alone, SentencePiece would lose its leading space."""

        def decode(ids: list[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        return decode(prompt + generated)[len(decode(prompt)) :]


class _StopStrings(StoppingCriteria):
    """Ends a row when its generated text holds a stop string; `ends` keeps the length at which it did."""

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
