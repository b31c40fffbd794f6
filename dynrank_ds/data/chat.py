"""Conversations in the tokenizer's chat template, and which of their text is learned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.conversations import Conversation, read_conversation
from dynrank_ds.data.rows import Row, UnfitRowError
from dynrank_ds.data.text import TEMPLATE_FAULTS, Format, Text
from dynrank_ds.errors import ModelError

_REASONING = ("reasoning_content", "reasoning", "thinking")
_OPENS_THINKING = re.compile(r"(?P<open>[<\[◁][^\s<>\[\]/]*(?:think|reason)[^\s<>\[\]/]*[>\]▷])\s*$")


@dataclass(frozen=True)
class ChatFormat(Format):
    """A conversation in the tokenizer's chat template, of which assistant turns are learned: all but masked ones.

    What follows the last learned turn is left out. Rows are unfit where the template would leave out what they say
    (tool calls, tools, reasoning, content), so that what is trained on is what they mean.
    """

    templated = True
    fields = ("messages", "tools", "system", "documents", "chat_template_kwargs")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise ModelError(
                f"data.format needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none: "
                "take a chat model, or another format"
            )
        asked = [{"role": "user", "content": "question"}]
        try:
            text = _rendered(tokenizer, [*asked, {"role": "assistant", "content": "answer"}], {}, asks=False)
            prompts = [_rendered(tokenizer, asked, {}, asks=asks) for asks in (False, True)]
        except TemplateError:
            return  # it wants more than these messages: rows will show
        begins = text[len(prompts[0]) :].lstrip() if text.startswith(prompts[0]) else "answer"
        if prompts[0] == prompts[1] and not begins.startswith("answer"):
            written = begins.partition("answer")[0]
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path!r} has no generation prompt: the model would learn to "
                f"write {written!r} itself: write that under {{% if add_generation_prompt %}} too"
            )

    def text(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
        conversation = read_conversation(row, tokenizer)
        if not any(message["role"] == "assistant" for message in conversation.messages[1:]):
            raise row.unfit("no assistant turn", "the messages hold no assistant turn after another message")
        if not conversation.learned or conversation.learned[0] == 0:
            raise row.unfit(
                "no assistant turn",
                "the messages hold no assistant turn that is learned after another message",
            )
        try:
            return _Turns(row, tokenizer, conversation).text()
        except TemplateError as error:
            raise row.unfit(
                "refused by the chat template", f"the chat template refuses it ({error})"
            ) from error

    def definition(self) -> str:
        return f"{self!r} 2"


class _Turns:
    """One conversation's learned turns in the template's text."""

    def __init__(self, row: Row, tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
        self.row, self.tokenizer, self.choices = row, tokenizer, conversation.choices
        self.learned = conversation.learned
        self.messages = conversation.messages[: self.learned[-1] + 1]

    def text(self) -> Text:
        whole = self._rendered(self.messages)
        prompts = [self._rendered(self.messages[:turn], asks=True) for turn in self.learned]
        self._refuse_what_is_left_out(whole, thinks=bool(_OPENS_THINKING.search(prompts[-1])))
        if not whole.startswith(prompts[-1]) and _OPENS_THINKING.search(prompts[-1]):
            whole = self._behind_opened_thought(whole, prompts[-1])
        if not all(whole.startswith(prompt) for prompt in prompts):
            raise self._changed()
        ends = [self._end(turn, whole) for turn in self.learned]
        stops = [*prompts[1:], whole]
        for turn, prompt, stop in zip(self.learned, prompts, stops, strict=True):
            content = self.messages[turn]["content"] or ""
            if not _shows(whole[len(prompt) : len(stop)], content):
                raise self.row.unfit(
                    "changed by the chat template",
                    f"the chat template changes or leaves out a part of message {turn + 1}'s content",
                )
        return Text(whole, tuple(prompts), tuple(ends), bool(_OPENS_THINKING.search(prompts[-1])))

    def _rendered(self, messages: list[dict[str, Any]], asks: bool = False) -> str:
        return _rendered(self.tokenizer, messages, self.choices, asks)

    def _changed(self) -> UnfitRowError:
        return self.row.unfit(
            "changed by the chat template",
            "the chat template writes earlier turns in another way once later ones follow, so no model would ever see "
            "what is trained on: learn the last turn alone (weight: 0 at the others), or give each turn a row",
        )

    def _end(self, turn: int, whole: str) -> str | None:
        """Where a turn ends in which the template itself may write special tokens, such as those of a call."""
        if not self.messages[turn].keys() & {"tool_calls", *_REASONING}:
            return None
        if turn == self.learned[-1]:
            return whole
        end = self._rendered(self.messages[: turn + 1])
        if not whole.startswith(end):
            raise self._changed()
        return end

    def _refuse_what_is_left_out(self, whole: str, thinks: bool) -> None:
        for key in sorted(self.choices.keys() & {"tools", "documents"}):
            fewer = {name: value for name, value in self.choices.items() if name != key}
            if self._same(whole, self.messages, fewer):
                raise self.row.unfit(
                    f"a template without {key}",
                    f"the chat template writes nothing of field {key!r}: take a model whose template does",
                )
        for place, message in enumerate(self.messages):
            keys = ["tool_calls", "function_call"]
            # What a template that opens the thought in its prompt leaves out of the last turn stands behind it here.
            if place in self.learned and not (thinks and place == self.learned[-1]):
                keys += _REASONING
            for key in message.keys() & set(keys):
                fewer = {name: value for name, value in message.items() if name != key}
                if self._same(
                    whole, [*self.messages[:place], fewer, *self.messages[place + 1 :]], self.choices
                ):
                    raise self.row.unfit(
                        f"a template without {key}",
                        f"the chat template writes nothing of message {place + 1}'s {key!r}: take a model whose "
                        "template does, or weight: 0 where it does so only in the last turn",
                    )

    def _same(self, whole: str, messages: list[dict[str, Any]], choices: dict[str, Any]) -> bool:
        try:
            return _rendered(self.tokenizer, messages, choices, asks=False) == whole
        except TemplateError:
            return False  # it asks for what is missing

    def _behind_opened_thought(self, whole: str, prompt: str) -> str:
        """Return the text with the last turn behind the thought that its prompt opens and the template leaves out.

        In that place stands what the row says of the model's reasoning, or an empty thought where it says nothing.
        """
        opened = _OPENS_THINKING.search(prompt)
        assert opened is not None
        before, tag = prompt[: opened.start()], opened["open"]
        message = self.messages[-1]
        answer = message["content"] or ""
        thought = next((message[key] for key in _REASONING if key in message), "")
        if answer.lstrip().startswith(tag):
            thought, _, answer = answer.lstrip().removeprefix(tag).partition(_closing(tag))
        body, answer = whole[len(before) :], answer.strip()
        if not whole.startswith(before) or tag in body.partition(answer)[0] or answer not in body:
            raise self._changed()
        return f"{prompt}{thought.strip()}\n{_closing(tag)}\n\n{body[body.index(answer) :]}"


def _closing(opening: str) -> str:
    return f"{opening[0]}/{opening[1:]}"


def _shows(segment: str, content: str) -> bool:
    """Whether a turn's text holds its content, white space and the tags around a thought aside."""
    squeezed = "".join(segment.split())
    parts = re.split(r"[<\[◁]/?[^\s<>\[\]/]*think[^\s<>\[\]/]*[>\]▷]", content)
    return all("".join(part.split()) in squeezed for part in parts)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], choices: dict[str, Any], asks: bool
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **choices)
        )
    except TEMPLATE_FAULTS as error:
        raise TemplateError(str(error)) from error
