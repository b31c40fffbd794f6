"""Conversations as data sets have them: what a row says is trained on, or the row is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.rows import Row, UnfitRowError
from dynrank_ds.errors import ModelError
from tests.data.conftest import tokenised

# As Qwen2.5's and Hermes': tools in a system turn, calls behind the content.
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }} {{ c.function.arguments | tojson }}<|/call|>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: a thought only behind the last question, an empty one where the last answer has none.
LAST_THOUGHT = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opened }}{% endif %}"
)
# As DeepSeek-R1's and QwQ's: the thought is opened by the prompt and left out of every answer that is written.
NO_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = {"role": "user", "content": "Weather in Paris?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    ],
}
RESULT = {"role": "tool", "content": "12 C", "tool_call_id": "1"}
ANSWER = {"role": "assistant", "content": "It is 12 C."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    specials = ["<|im_start|>", "<|im_end|>", "<|call|>", "<|/call|>"]
    copy.add_special_tokens({"additional_special_tokens": specials})
    copy.add_tokens(
        ["\n\n"]
    )  # as most byte-level tokenizers have: it would join an opened thought with its end
    return copy


def learned(tokenizer: PreTrainedTokenizerFast, template: str, **fields: Any) -> list[str]:
    """The text of each run of targets; a run of context stands between two."""
    tokenizer.chat_template = template
    ids, targets = tokenised([Row(fields, "row 1")], tokenizer, FORMATS["chat"]).sample(0)
    changes = np.flatnonzero(np.diff(targets.astype(int), prepend=0, append=0))
    return [tokenizer.decode(ids[a:b]) for a, b in changes.reshape(-1, 2)]


def seen(tokenizer: PreTrainedTokenizerFast, template: str, **fields: Any) -> str:
    tokenizer.chat_template = template
    ids = tokenised([Row(fields, "row 1")], tokenizer, FORMATS["chat"]).sample(0).ids
    return str(tokenizer.decode(ids))


def refused(tokenizer: PreTrainedTokenizerFast, template: str, **fields: Any) -> str:
    tokenizer.chat_template = template
    with pytest.raises(UnfitRowError) as error:
        FORMATS["chat"].text(Row(fields, "row 1"), tokenizer)
    return str(error.value)


def test_calls_and_tools_are_what_the_template_writes(base: PreTrainedTokenizerFast) -> None:
    messages = [QUESTION, CALL, RESULT, ANSWER]
    call = '<|call|>weather {"city": "Paris"}<|/call|><|im_end|>'
    for tools in ([TOOL], json.dumps([TOOL])):
        assert learned(base, TOOLS, messages=messages, tools=tools) == [call, "It is 12 C.<|im_end|>"]
        text = seen(base, TOOLS, messages=messages, tools=tools)
        whole = base.apply_chat_template(messages, tools=[TOOL], tokenize=False)
        assert text == whole.replace(json.dumps('{"city": "Paris"}'), '{"city": "Paris"}').rstrip("\n") + "\n"
    assert learned(base, TOOLS, messages=messages[:2]) == [call], "as the last turn too"


def test_a_template_that_leaves_out_what_a_row_says_is_refused(base: PreTrainedTokenizerFast) -> None:
    calling = [QUESTION, {**CALL, "content": "Let me see."}, RESULT, ANSWER]
    assert "writes nothing of message 2's 'tool_calls'" in refused(base, PLAIN, messages=calling)
    assert "writes nothing of field 'tools'" in refused(
        base, PLAIN, messages=[QUESTION, ANSWER], tools=[TOOL]
    )
    thinking = [QUESTION, {**ANSWER, "reasoning_content": "Let me see."}]
    assert "writes nothing of message 2's 'reasoning_content'" in refused(base, PLAIN, messages=thinking)
    twice = [*thinking, QUESTION, ANSWER]
    assert "writes nothing of message 2's 'reasoning_content'" in refused(base, LAST_THOUGHT, messages=twice)
    adding = PLAIN.replace("{{ m.content }}", "{{ m.content + '' }}")
    null = [QUESTION, CALL, RESULT, ANSWER]
    assert "the chat template refuses it (unsupported operand" in refused(base, adding, messages=null)
    cut = "{{ messages[0].content }}{% for m in messages[1:] %} A: {{ m.content[:4] }}<|im_end|>{% endfor %} A: "
    assert "leaves out a part of message 2's content" in refused(base, cut[:-4], messages=[QUESTION, ANSWER])


def test_reasoning_that_the_template_writes_is_learned(base: PreTrainedTokenizerFast) -> None:
    thinking = [QUESTION, {**ANSWER, "reasoning_content": "Let me see."}]
    assert learned(base, LAST_THOUGHT, messages=thinking) == [
        "<think>\nLet me see.\n</think>\n\nIt is 12 C.<|im_end|>"
    ]
    masked = [QUESTION, {**thinking[1], "weight": 0}, QUESTION, ANSWER]
    assert learned(base, LAST_THOUGHT, messages=masked) == ["<think>\n\n</think>\n\nIt is 12 C.<|im_end|>"]


@pytest.mark.parametrize(
    ("thought", "fields"),
    [
        ("", {}),
        ("Let me see.", {"reasoning_content": "Let me see."}),
        ("Let me see.", {"content": "<think>\nLet me see.\n</think>\n\nIt is 12 C."}),
    ],
)
@pytest.mark.parametrize("template", ["no thought", "last thought"])
def test_the_answer_stands_behind_the_thought_that_the_prompt_opens(
    thought: str, fields: dict[str, str], template: str, base: PreTrainedTokenizerFast
) -> None:
    if template == "last thought" and "content" in fields:
        fields = {"reasoning_content": thought}
    chosen = NO_THOUGHT if template == "no thought" else LAST_THOUGHT.replace("{{ opened }}", "<think>\n")
    messages = [QUESTION, {**ANSWER, **fields}]
    assert learned(base, chosen, messages=messages) == [f"{thought}\n</think>\n\nIt is 12 C.<|im_end|>"]
    base.chat_template = chosen
    prompt = base.apply_chat_template([QUESTION], add_generation_prompt=True)["input_ids"]
    sample = tokenised([Row({"messages": messages}, "row 1")], base, FORMATS["chat"]).sample(0)
    assert sample.ids[: sample.n_prompt].tolist() == prompt, "the tokens that generation is given"


def test_earlier_answers_behind_an_opened_thought_are_refused_unless_masked(
    base: PreTrainedTokenizerFast,
) -> None:
    messages = [QUESTION, ANSWER, QUESTION, ANSWER]
    assert "learn the last turn alone (weight: 0 at the others)" in refused(
        base, NO_THOUGHT, messages=messages
    )
    messages[1] = {**ANSWER, "weight": 0}
    assert learned(base, NO_THOUGHT, messages=messages) == ["\n</think>\n\nIt is 12 C.<|im_end|>"]


@pytest.mark.parametrize(
    "mask",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"mask": True},
        {"masked": 1},
    ],
)
def test_masked_turns_are_context_and_not_learned(
    mask: dict[str, Any], base: PreTrainedTokenizerFast
) -> None:
    first = {"role": "assistant", "content": "wrong", **mask}
    messages = [QUESTION, first, QUESTION, {**ANSWER, "weight": 1, "mask": None}]
    assert learned(base, PLAIN, messages=messages) == ["It is 12 C.<|im_end|>"]
    assert "wrong" in seen(base, PLAIN, messages=messages)
    assert "no assistant turn that is learned" in refused(base, PLAIN, messages=messages[:2])
    half = [QUESTION, {**ANSWER, "weight": 0.5}]
    assert "message 2's weight is 0.5: it must be 0 or 1" in refused(base, PLAIN, messages=half)


def test_other_forms_are_the_same_conversation(base: PreTrainedTokenizerFast) -> None:
    plain = [{"role": "system", "content": "Be short."}, QUESTION, ANSWER]
    wanted = seen(base, PLAIN, messages=plain)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in plain]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    developer = [{**plain[0], "role": "developer"}, *plain[1:]]
    for fields in (
        {"conversations": sharegpt},
        {"conversations": sharegpt[1:], "system": "Be short.", "tools": ""},
        {"messages": parts},
        {"messages": developer},
        {"messages": plain[1:], "system": "Be short.", "tools": []},
    ):
        assert seen(base, PLAIN, **fields) == wanted, fields
    knows = PLAIN.replace("{% for", "{# developer #}{% for")
    assert "developer\nBe short." in seen(base, knows, messages=developer)
    called = [
        {"from": "human", "value": QUESTION["content"]},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "12 C"},
        {"from": "gpt", "value": ANSWER["content"]},
    ]
    flat = TOOLS.replace("c.function.name", "c.name").replace("c.function.arg", "c.arg")
    assert (
        learned(base, flat, conversations=called)[0] == '<|call|>weather {"city": "Paris"}<|/call|><|im_end|>'
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"messages": [QUESTION, ANSWER], "conversations": [QUESTION]},
            "'messages' and 'conversations' each hold",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
            "message 1 holds a part of type 'image_url': only text is learned",
        ),
        (
            {"messages": [QUESTION, ANSWER], "functions": [TOOL]},
            "field 'functions' is the old form of 'tools'",
        ),
        ({"messages": [QUESTION, ANSWER], "tools": "{"}, "field 'tools' are text that is no JSON"),
        ({"messages": [QUESTION, {**CALL, "tool_calls": [{"id": "1"}]}]}, "hold a call without a name"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": []}]},
            "message 2's content is empty",
        ),
        (
            {"messages": [QUESTION, {**CALL, "tool_calls": [{"name": "f", "arguments": "<|im_end|>"}]}]},
            "arguments are text that is no JSON",
        ),
        (
            {
                "messages": [
                    QUESTION,
                    {**CALL, "tool_calls": [{"name": "f", "arguments": {"a": ["<|im_end|>"]}}]},
                ]
            },
            "message 2 holds the tokenizer's special token '<|im_end|>'",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, QUESTION, ANSWER], "system": "b"},
            "both a system text",
        ),
    ],
)
def test_what_no_template_can_be_given_is_refused(
    fields: dict[str, Any], sentence: str, base: PreTrainedTokenizerFast
) -> None:
    assert sentence in refused(base, TOOLS, **fields)


def test_a_template_without_generation_prompt_is_refused(base: PreTrainedTokenizerFast) -> None:
    """The model would learn to write the header of its own turn."""
    base.chat_template = PLAIN.partition("{% if add")[0]
    with pytest.raises(
        ModelError, match=r"has no generation prompt: the model would learn to write '<\|im_start"
    ):
        tokenised([Row({"messages": [QUESTION, ANSWER]}, "row 1")], base, FORMATS["chat"])


def test_alpaca_rows_with_a_history_or_a_system_text_are_refused(base: PreTrainedTokenizerFast) -> None:
    fields = {"instruction": "i", "output": "o"}
    for more in ({"history": [["a", "b"]]}, {"system": "Be short."}):
        with pytest.raises(
            UnfitRowError, match=f"field '{next(iter(more))}' has no place in Alpaca's prompt"
        ):
            FORMATS["alpaca"].text(Row({**fields, **more}, "row 1"), base)
    FORMATS["alpaca"].text(Row({**fields, "history": [], "system": ""}, "row 1"), base)
