"""A row's conversation as chat templates take it: messages with role and content, tools, and which turns are learned.

Read are the forms of OpenAI's fine-tuning files (`messages` with role and content, content parts, tool calls whose
arguments are JSON text, `weight`) and ShareGPT's (`conversations` with from and value). What a template could not be
given without changing its meaning makes the row unfit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from dynrank_ds.data.rows import Row

ROLES = ("system", "user", "assistant", "tool", "developer")
_LISTS = ("messages", "conversations", "conversation")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_LEARNED_IF = {"weight": 1, "train": 1, "training": 1, "loss": 1, "mask": 0, "masked": 0}
"""Keys of a message that say whether it is learned, and the value (or its truth) at which it is."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    messages: as dictionaries. learned: the places among them of the assistant turns that are learned. choices: further
    arguments of the template: tools, documents, and those of the row's `chat_template_kwargs`.
    """

    messages: list[dict[str, Any]]
    learned: tuple[int, ...]
    choices: dict[str, Any] = field(default_factory=dict)


def read_conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """Return the conversation of a row.

    Raises:
        UnfitRowError: it has none, or one that no template can be given as it is meant.
    """
    messages, learned = [], []
    knows_developer = "developer" in str(tokenizer.chat_template)
    for number, given in enumerate(_listed(row), start=1):
        message, is_learned = _message(row, number, given)
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"  # what the role was called before
        messages.append(message)
        learned.append(is_learned)
    if system := row.fields.get("system"):
        if messages[0]["role"] in ("system", "developer"):
            raise row.unfit("two system texts", "field 'system' and the first message are both a system text")
        messages.insert(0, {"role": "system", "content": row.checked(system, "field 'system'")})
        learned.insert(0, False)
    found = Conversation(messages, tuple(place for place, yes in enumerate(learned) if yes), _choices(row))
    _refuse_special_tokens(row, found, tokenizer)
    return found


def _listed(row: Row) -> list[Any]:
    given = [name for name in _LISTS if row.fields.get(name) is not None]
    if len(given) > 1:
        raise row.unfit(
            "two conversations",
            f"fields {' and '.join(map(repr, given))} each hold a conversation: keep one of them",
        )
    messages = row.fields[given[0]] if given else None
    if not isinstance(messages, list) or not messages:
        raise row.unfit(
            "no messages",
            f"field {given[0] if given else 'messages'!r} must be a list of messages with role and content",
        )
    return messages


def _message(row: Row, number: int, given: Any) -> tuple[dict[str, Any], bool]:
    """Return a message as the template gets it, and whether it is learned."""
    message = dict(given) if isinstance(given, dict) else {}
    role = message.pop("from", None) if "role" not in message else message.pop("role")
    content = message.pop("value", None) if "content" not in message else message.pop("content")
    if role == "function_call":  # in ShareGPT's form a message of its own
        role, content, message["tool_calls"] = "assistant", None, [content]
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise row.unfit(
            "a message without role", f"message {number} must have a role, one of {', '.join(ROLES)}"
        )
    learned = _learned(row, number, message) and role == "assistant"
    # A null is how many writers say that a key is absent.
    message = {"role": role} | {key: value for key, value in message.items() if value is not None}
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _tool_calls(row, number, calls)
    for key in ("reasoning_content", "reasoning", "thinking"):
        if key in message:
            row.checked(message[key], f"message {number}'s {key}")
    text = _content(row, number, content)
    if "tool_calls" in message and not text:
        message["content"] = text  # None stays None: templates ask for it
    elif role == "tool" and text == "":
        message["content"] = text
    else:
        message["content"] = row.checked(text, f"message {number}'s content")
    return message, learned


def _learned(row: Row, number: int, message: dict[str, Any]) -> bool:
    """Take the keys that say so out of the message."""
    learned = True
    for key, wanted in _LEARNED_IF.items():
        value = message.pop(key, None)
        if value is not None and value not in (0, 1):
            raise row.unfit(
                "a weight that is not 0 or 1", f"message {number}'s {key} is {value!r}: it must be 0 or 1"
            )
        learned = learned and (value is None or value == wanted)
    return learned


def _content(row: Row, number: int, content: Any) -> Any:
    """Content parts as one text, a part a line; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise row.unfit(
                "a part that is no text",
                f"message {number} holds a part of type {kind!r}: only text is learned",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(row: Row, number: int, calls: Any) -> list[dict[str, Any]]:
    """Return the calls with their arguments as dictionaries, as templates expect and vLLM's server gives them."""
    what = f"message {number}'s tool_calls"
    found: list[dict[str, Any]] = []
    for given in calls if isinstance(calls, list) else [calls]:
        call = _parsed(row, given, what)
        if not isinstance(call, dict):
            raise row.unfit("malformed tool calls", f"{what} must be a list of objects")
        nested = isinstance(call.get("function"), dict)
        function: dict[str, Any] = call["function"] if nested else call
        if not isinstance(function.get("name"), str):
            raise row.unfit("malformed tool calls", f"{what} hold a call without a name")
        if "arguments" in function:
            arguments = _parsed(row, function["arguments"], f"{what}: arguments")
            function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if nested else function)
    return found


def _parsed(row: Row, value: Any, what: str) -> Any:
    """`value`, read as JSON where it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise row.unfit("malformed tool calls", f"{what} are text that is no JSON ({error})") from error


def _choices(row: Row) -> dict[str, Any]:
    if row.fields.get("functions"):
        raise row.unfit(
            "functions",
            "field 'functions' is the old form of 'tools': give {type: function, function: ...} there",
        )
    choices = {}
    if tools := _parsed(row, row.fields.get("tools"), "field 'tools'"):
        tools = [_parsed(row, tool, "field 'tools'") for tool in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise row.unfit("malformed tools", "field 'tools' must be a list of objects")
        choices["tools"] = tools
    if documents := row.fields.get("documents"):
        choices["documents"] = documents
    more = row.fields.get("chat_template_kwargs") or {}
    if not isinstance(more, dict):
        raise row.unfit("malformed arguments", "field 'chat_template_kwargs' must be an object")
    return choices | more


def _refuse_special_tokens(row: Row, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for number, message in enumerate(conversation.messages, start=1):
        _refuse_in(row, message, f"message {number}", specials)
    _refuse_in(row, conversation.choices, "field 'tools' or 'documents'", specials)


def _refuse_in(row: Row, value: Any, what: str, specials: list[str]) -> None:
    for text in _texts(value):
        if found := [special for special in specials if special in text]:
            raise row.unfit(
                "holds a special token", f"{what} holds the tokenizer's special token {found[0]!r}"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
