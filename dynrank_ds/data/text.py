"""What a format makes of a row: its text, and where in it answers begin and end."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.rows import Row

TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template's own expressions raise of values that they were not written for, such as text + null."""


@dataclass(frozen=True)
class Text:
    """A row as text.

    text: all of it. prompts: beginnings of it, each of which ends where an answer begins, shortest first; what
    generation would be given there. ends: for each prompt the beginning of the text at whose last special token the
    answer ends, None where its first special token ends it; () is None for all. apart: whether the last prompt and what
    follows it are tokenised one by one, as generation has them.
    """

    text: str
    prompts: tuple[str, ...]
    ends: tuple[str | None, ...] = ()
    apart: bool = False


class Format(ABC):
    """How rows of one kind become text."""

    templated = False
    """Whether the tokenizer's chat template writes the text, special tokens included."""

    @property
    def fields(self) -> tuple[str, ...] | None:
        """The fields of a row that are read, None where any may be."""
        return None

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027 - most formats need nothing
        """Raise ModelError for a tokenizer that the format cannot be used with."""

    @abstractmethod
    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        """Return the row's text; UnfitRowError naming the row where it has none."""

    @abstractmethod
    def definition(self) -> str:
        """Return what changes when the texts do, beside the tokenizer and its chat template."""
