"""Rows to token ids, with the boundaries of the answers where generation will see them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.rows import Drops, Row, UnfitRowError
from dynrank_ds.data.text import Format, Text
from dynrank_ds.errors import ModelError

_CHUNK = 4096
_CHARACTERS_A_TOKEN = 64
"""More than tokens of real text have on average, runs of blanks included."""


class Sample(NamedTuple):
    """One sample's tokens (int32), and which of them are targets of the loss (bool)."""

    ids: NDArray[np.int32]
    targets: NDArray[np.bool_]

    @property
    def n_prompt(self) -> int:
        """Tokens before the first target."""
        return int(self.targets.argmax())


@dataclass(frozen=True)
class TokenisedDataset:
    """All samples in flat arrays, which may be files mapped into memory.

    tokens: (total,) int32; targets: (total,) bool, the tokens that the loss is taken on; starts, lengths and
    target_counts: (n,) int64; sample i is tokens[starts[i] : starts[i] + lengths[i]].
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    target_counts: NDArray[np.int64]
    source_of: NDArray[np.int16] = field(default_factory=lambda: np.empty(0, np.int16))
    """(n,) the number of each sample's source; empty where there is but one."""

    def __len__(self) -> int:
        return len(self.starts)

    def sample(self, index: int) -> Sample:
        """Return the tokens and targets of one sample."""
        place = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return Sample(self.tokens[place], self.targets[place])

    def select(self, indices: NDArray[np.int64]) -> "TokenisedDataset":
        """Return only these samples, in this order; the tokens stay where they are."""
        return replace(
            self,
            starts=self.starts[indices],
            lengths=self.lengths[indices],
            target_counts=self.target_counts[indices],
            source_of=self.source_of[indices] if len(self.source_of) else self.source_of,
        )


def tokenise(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    format: Format,
    max_length: int,
    drops: Drops,
    truncates: bool = False,
) -> Iterator[list[Sample]]:
    """Yield the samples of each chunk of rows, in their order; the tokenizer works on a chunk with all cores.

    A prompt's tokens are exactly those of `tokenizer(prompt)`, which is what an evaluator feeds the model, with
    the one beginning-of-text token that it prepends where the tokenizer has that habit. The answer's are the
    rest of `tokenizer(prompt + answer)`, then one end-of-text token: what the model should write next. Tokenising
    the answer alone would be wrong for SentencePiece (a second leading space) and, for byte-level BPE, wherever a
    tokenizer treats the start of a text in its own way. In a chat, the end-of-text token is the special token
    that the template ends a turn with.

    Rows that cannot be trained on are left out and counted in `drops`: longer than max_length tokens (unless
    `truncates` has them cut, which teaches not to stop), without a text, with a special token in their text, or with
    a prompt whose last token changes when the answer follows. Raises ModelError for a tokenizer without end-of-text
    token or that appends it to prompts, or without the chat template that the format needs.
    """
    check_tokenizer(tokenizer, format)
    encoder = _Encoder(tokenizer, format, max_length, drops, truncates)
    remaining = iter(rows)
    while chunk := list(islice(remaining, _CHUNK)):
        drops.n_rows += len(chunk)
        yield list(encoder.samples(chunk))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, format: Format) -> None:
    """Raise ModelError for a tokenizer that cannot be trained with."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, training needs one")
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} appends its end-of-text token to every text, "
            "so no prompt could be continued; set add_eos_token to false in its tokenizer_config.json"
        )
    format.check(tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that no text may hold: special tokens with and without a name, such as LLaMA-3's <|eot_id|>.

    The unknown token is not one of them, unless it is another's too: it stands for ordinary text.
    """
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    unnamed = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *unnamed} - ({tokenizer.unk_token_id} - named))


def _parts(text: Text) -> list[str]:
    """Return what of a text is tokenised, in the order in which `_Encoder.samples` takes it."""
    ends = [end for end in text.ends if end is not None]
    return [text.text, *text.prompts, *ends, *([text.text[len(text.prompts[-1]) :]] if text.apart else [])]


class _Encoder:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: Format,
        max_length: int,
        drops: Drops,
        truncates: bool,
    ) -> None:
        self.tokenizer, self.format, self.max_length = tokenizer, format, max_length
        self.drops, self.truncates = drops, truncates
        self.specials = special_ids(tokenizer)

    def samples(self, rows: Sequence[Row]) -> Iterator[Sample]:
        """Yield the samples of the rows that can be trained on."""
        texts: list[tuple[Row, Text]] = []
        for row in rows:
            try:
                texts.append((row, self._text(row)))
            except UnfitRowError as error:
                self.drops.add(error)
        parts = [part for _, text in texts for part in _parts(text)]
        if not parts:
            return
        # One call: the tokenizer's threads share out the texts of a call.
        adds_special = not self.format.templated
        ids = self.tokenizer(parts, add_special_tokens=adds_special, return_attention_mask=False)["input_ids"]
        encoded = iter(ids)
        for row, text in texts:
            whole = next(encoded)
            prompts = list(islice(encoded, len(text.prompts)))
            ends = [None if end is None else next(encoded) for end in text.ends] or [None] * len(prompts)
            try:
                if text.apart:
                    whole = self._joined(row, whole, prompts[-1] + next(encoded))
                yield self._sample(row, whole, prompts, ends)
            except UnfitRowError as error:
                self.drops.add(error)

    def _joined(self, row: Row, whole: list[int], joined: list[int]) -> list[int]:
        """Return the tokens of prompt and answer one by one, which must be the same text as both together."""
        if self.tokenizer.decode(whole) != self.tokenizer.decode(joined):
            raise row.unfit(
                "no stable boundary",
                "prompt and answer are another text to this tokenizer than both together",
            )
        return joined

    def _text(self, row: Row) -> Text:
        text = self.format.text(row, self.tokenizer)
        # A book that slipped into a row would take minutes and gigabytes to tokenise, only to be dropped.
        if len(text.text) > _CHARACTERS_A_TOKEN * self.max_length and not self.truncates:
            self.drops.add_length(None)
            raise row.unfit(
                "too long",
                f"{len(text.text):,} characters, too many for the {self.max_length} tokens of data.max_length",
            )
        return text

    def _sample(
        self, row: Row, ids: list[int], prompts: list[list[int]], ends: list[list[int] | None]
    ) -> Sample:
        if not self.format.templated:
            self._refuse_specials(row, ids)
            ids = [*ids, self.tokenizer.eos_token_id]
        if len(ids) > self.max_length and not self.truncates:
            self.drops.add_length(len(ids))
            raise row.unfit(
                "too long", f"{len(ids)} tokens, more than the {self.max_length} of data.max_length"
            )
        targets = np.zeros(len(ids), dtype=np.bool_)
        for prompt, end in zip(prompts, ends, strict=True):
            start = len(prompt)
            if not prompt:
                raise row.unfit(
                    "no prompt",
                    "the prompt is no token to this tokenizer, so nothing could predict an answer",
                )
            if ids[:start] != prompt:
                raise row.unfit(
                    "no stable boundary",
                    "the prompt's last token changes when the answer follows it, so the model would be trained "
                    "on a boundary it never sees: the prompt must end with a whole token",
                )
            targets[start : self._end_of_turn(row, ids, start, end)] = True
        if len(ids) > self.max_length:
            ids, targets = ids[: self.max_length], targets[: self.max_length]
            if not targets.any():
                raise row.unfit(
                    "nothing left of the answer",
                    f"the {self.max_length} tokens of data.max_length leave nothing of the answer",
                )
            self.drops.n_truncated += 1
        return Sample(np.asarray(ids, dtype=np.int32), targets)

    def _end_of_turn(self, row: Row, ids: list[int], start: int, end: list[int] | None) -> int:
        """Behind the first special token from `start` on, or, given where the turn ends, the last one before that.

        No text holds one, so it ends the turn; but the template may write some around a tool call.
        """
        places = [
            place for place in range(start, len(ids if end is None else end)) if ids[place] in self.specials
        ]
        if places:
            return places[0 if end is None else -1] + 1
        raise row.unfit(
            "no end of turn",
            "the chat template ends the assistant's turn without special token, so the model would not learn to stop",
        )

    def _refuse_specials(self, row: Row, ids: list[int]) -> None:
        begins = int(ids[0] == self.tokenizer.bos_token_id)
        found = self.specials.intersection(ids[begins:])
        if found:
            names = ", ".join(repr(t) for t in self.tokenizer.convert_ids_to_tokens(sorted(found)))
            raise row.unfit(
                "holds a special token", f"the text holds the tokenizer's special token {names}, remove it"
            )
