"""From a row's fields to the text that is trained on, and where in it answers begin."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.rows import Row
from dynrank_ds.prompts import PROMPTS, render

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Text:
    """A row as text.

    text: all of it. prompts: beginnings of it, each of which ends where an answer begins, shortest first; what
    generation would be given there.
    """

    text: str
    prompts: tuple[str, ...]


class Format(ABC):
    """How rows of one kind become text."""

    templated = False
    """Whether the tokenizer's chat template writes the text, special tokens included."""

    @abstractmethod
    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        """The row's text; UnfitRowError naming the row where it has none."""

    @abstractmethod
    def definition(self) -> str:
        """What changes when the texts do, beside the tokenizer and its chat template."""


@dataclass(frozen=True)
class PromptFormat(Format):
    """One question and its answer, in a prompt of dynrank_ds.prompts."""

    prompt: str
    question: str
    answer: str

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        return _answered(render(self.prompt, row.text(self.question)), row.text(self.answer))

    def definition(self) -> str:
        return repr((self, PROMPTS[self.prompt]))


@dataclass(frozen=True)
class AlpacaFormat(Format):
    """Stanford Alpaca's rows: instruction, output, and often an input, which has a prompt of its own."""

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        instruction, output = row.text("instruction"), row.text("output")
        if row.fields.get("input") in (None, ""):
            return _answered(render("alpaca", instruction), output)
        return _answered(render("alpaca_input", instruction, row.text("input")), output)

    def definition(self) -> str:
        return repr((self, PROMPTS["alpaca"], PROMPTS["alpaca_input"]))


@dataclass(frozen=True)
class CompletionFormat(Format):
    """A prompt and its completion, byte for byte: nothing is added or stripped but the end-of-text token."""

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        prompt = row.raw_text("prompt")
        return Text(prompt + row.raw_text("completion"), (prompt,))

    def definition(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class ChatFormat(Format):
    """A conversation in the tokenizer's chat template, of which every assistant turn is learned.

    messages: [{"role", "content"}, ...]; what follows the last assistant turn is left out.
    """

    templated = True

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        messages = _messages(row, tokenizer)
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise row.unfit("no assistant turn", "the messages hold no assistant turn after another message")
        try:
            text = _templated(tokenizer, messages[: turns[-1] + 1], asks=False)
            prompts = tuple(_templated(tokenizer, messages[:turn], asks=True) for turn in turns)
        except TemplateError as error:
            raise row.unfit(
                "refused by the chat template", f"the chat template refuses it ({error})"
            ) from error
        if not all(text.startswith(prompt) for prompt in prompts):
            raise row.unfit(
                "changed by the chat template",
                "the chat template writes earlier turns in another way once later ones follow, so no model "
                "would ever see what is trained on",
            )
        return Text(text, prompts)

    def definition(self) -> str:
        return repr(self)


def _answered(prompt: str, answer: str) -> Text:
    """The answer starts with the one space that a model writes after the prompt's last word."""
    return Text(f"{prompt} {answer}", (prompt,))


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], asks: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))


def _messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise row.unfit("no messages", "field 'messages' must be a list of messages with role and content")
    return [_message(row, place, message, tokenizer) for place, message in enumerate(messages, start=1)]


def _message(row: Row, place: int, message: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise row.unfit(
            "a message without role", f"message {place} must have a role, one of {', '.join(_ROLES)}"
        )
    content = row.checked(message.get("content"), f"message {place}'s content")
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in content:
            raise row.unfit(
                "holds a special token",
                f"message {place} holds the tokenizer's special token {token.content!r}",
            )
    return {"role": message["role"], "content": content}


FORMATS: dict[str, Format] = {
    # The prompts of MetaMath's and of PiSSA's evaluation: dynrank-eval's protocols metamath-v1 and pissa-v1.
    "metamathqa": PromptFormat(prompt="metamath", question="query", answer="response"),
    "codefeedback": PromptFormat(prompt="alpaca", question="query", answer="answer"),
    "alpaca": AlpacaFormat(),
    "chat": ChatFormat(),
    "completion": CompletionFormat(),
}
