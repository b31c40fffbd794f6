"""Rows to token ids, with the boundary between prompt and answer where generation will see it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.formats import Format
from dynrank_ds.data.sources import Row
from dynrank_ds.errors import DataError, ModelError

logger = logging.getLogger(__name__)

_CHUNK = 4096


class Sample(NamedTuple):
    """Tokens (int32, prompt then answer then end-of-text) and how many of them are the prompt's."""

    ids: NDArray[np.int32]
    n_prompt: int


@dataclass(frozen=True)
class TokenisedDataset:
    """All samples in flat arrays.

    tokens: (total,) int32; offsets: (n + 1,) int64, sample i is tokens[offsets[i]:offsets[i + 1]];
    prompt_lengths: (n,) int64, the first tokens of each sample, which are no targets.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each sample, prompt included."""
        return np.diff(self.offsets)

    @property
    def target_counts(self) -> NDArray[np.int64]:
        """(n,) tokens of each sample that the loss is taken on: the answer's and the end-of-text token."""
        return self.lengths - self.prompt_lengths

    def sample(self, index: int) -> Sample:
        return Sample(
            self.tokens[self.offsets[index] : self.offsets[index + 1]], int(self.prompt_lengths[index])
        )


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    format: Format,
    max_length: int,
    max_dropped: float = 0.01,
) -> TokenisedDataset:
    """Each row as the prompt's tokens, the answer's tokens and one end-of-text token.

    The prompt's tokens are exactly those of `tokenizer(prompt)`, which is what an evaluator feeds the model,
    with the one beginning-of-text token that it prepends where the tokenizer has that habit. The answer's
    are the rest of `tokenizer(prompt + answer)`: what the model should write next. Tokenising the answer
    alone would be wrong for SentencePiece (a second leading space) and, for byte-level BPE, wherever a
    tokenizer treats the start of a text in its own way.

    Rows longer than max_length tokens are dropped, never cut, since a cut answer teaches not to stop; a
    warning tells how many. Raises DataError where more than the fraction max_dropped of the rows is too
    long, where none is left, and for a row whose text holds a special token or whose boundary is unstable;
    ModelError for a tokenizer without end-of-text token or that appends it to prompts.
    """
    if not rows:
        raise DataError("the data set is empty, at least one row is needed")
    _check_tokenizer(tokenizer)
    kept: list[NDArray[np.int32]] = []
    prompt_lengths: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        for ids, n_prompt in _tokenise_chunk(rows[start : start + _CHUNK], tokenizer, format):
            if len(ids) <= max_length:
                kept.append(np.asarray(ids, dtype=np.int32))
                prompt_lengths.append(n_prompt)
    _check_dropped(len(rows) - len(kept), len(rows), max_length, max_dropped)
    return TokenisedDataset(
        tokens=np.concatenate(kept),
        offsets=np.cumsum([0, *map(len, kept)], dtype=np.int64),
        prompt_lengths=np.asarray(prompt_lengths, dtype=np.int64),
    )


def _tokenise_chunk(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, format: Format
) -> list[tuple[list[int], int]]:
    prompts, answers = zip(*(format.texts(row) for row in rows), strict=True)
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    whole_ids = tokenizer([p + a for p, a in zip(prompts, answers, strict=True)])["input_ids"]
    specials = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    samples = []
    for row, prompt, whole in zip(rows, prompt_ids, whole_ids, strict=True):
        if whole[: len(prompt)] != prompt:
            raise DataError(
                f"{row.origin}: the prompt's last token changes when the answer follows it, so the model "
                "would be trained on a boundary it never sees: the prompt must end with a whole token"
            )
        begins = int(whole[0] == tokenizer.bos_token_id)
        found = specials.intersection(whole[begins:])
        if found:
            names = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(sorted(found)))
            raise DataError(f"{row.origin}: the text holds the tokenizer's special token {names}, remove it")
        samples.append(([*whole, tokenizer.eos_token_id], len(prompt)))
    return samples


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, training needs one")
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} appends its end-of-text token to every text, "
            "so no prompt could be continued; set add_eos_token to false in its tokenizer_config.json"
        )


def _check_dropped(n_dropped: int, n_rows: int, max_length: int, max_dropped: float) -> None:
    if n_dropped == 0:
        return
    told = f"{n_dropped} of {n_rows} rows are longer than {max_length} tokens"
    if n_dropped == n_rows or n_dropped > max_dropped * n_rows:
        raise DataError(
            f"{told}, at most {max_dropped:.1%} may be: raise the maximum length or shorten the rows"
        )
    logger.warning("%s and were dropped", told)
