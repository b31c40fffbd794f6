"""What each format makes of a row; the papers' prompts are those of the evaluator."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.reading import read_file
from dynrank_ds.data.rows import Row, UnfitRowError
from dynrank_ds.errors import ModelError
from dynrank_ds.prompts import PROMPTS
from dynrank_eval.protocols import load_protocol
from tests.data.conftest import tokenised

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As LLaMA-2's: turns must alternate, each answer ends with the end-of-text token.
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def row(**fields: Any) -> Row:
    return Row(fields, "rows.jsonl, line 1")


def chat(*contents: str, first: str = "user") -> Row:
    """Turns of user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return row(messages=[{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)])


@pytest.fixture(scope="module", params=[CHATML, LLAMA2], ids=["chatml", "llama2"])
def chatty(tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    copy.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    copy.chat_template = request.param
    return copy


@pytest.mark.parametrize(
    ("format", "fields", "protocol", "task"),
    [
        ("metamathqa", {"query": "1 {x}?", "response": "r"}, "metamath-v1", "gsm8k"),
        ("metamathqa", {"query": "1 {x}?", "response": "r"}, "metamath-v1", "math"),
        ("codefeedback", {"query": "{input} {instruction}", "answer": "r"}, "pissa-v1", "humaneval"),
        ("codefeedback", {"query": "write", "answer": "r"}, "pissa-v1", "mbpp"),
    ],
)
def test_the_papers_formats_ask_as_the_papers_evaluation_does(
    format: str, fields: dict[str, str], protocol: str, task: str
) -> None:
    text = FORMATS[format].text(row(**fields), None)
    assert text.prompts == (load_protocol(protocol, task).render(fields["query"]),)
    assert text.text == text.prompts[0] + " r"


def test_alpaca_rows_have_a_prompt_with_input_and_one_without() -> None:
    bare = FORMATS["alpaca"].text(row(instruction="Add {input}.", input="", output="3"), None)
    assert bare.prompts[0].endswith("### Instruction:\nAdd {input}.\n\n### Response:")
    given_input = FORMATS["alpaca"].text(
        row(instruction="Add {input}.", input="1 {instruction}", output="3"), None
    )
    assert given_input.prompts[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {input}.\n\n### Input:\n1 {instruction}\n\n### Response:"
    )
    assert given_input.text == given_input.prompts[0] + " 3"
    with pytest.raises(UnfitRowError, match="line 1: field 'input' is 5"):
        FORMATS["alpaca"].text(row(instruction="i", input=5, output="o"), None)


@pytest.mark.parametrize(
    ("format", "prompt"),
    [
        ("metamathqa", "metamath"),
        ("codefeedback", "alpaca"),
        ("alpaca", "alpaca"),
        ("alpaca", "alpaca_input"),
    ],
)
def test_a_format_is_another_once_its_prompt_is(
    format: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was tokenised with the old prompt must not be taken for it."""
    before = FORMATS[format].definition()
    monkeypatch.setitem(PROMPTS, prompt, PROMPTS[prompt] + " ")
    assert FORMATS[format].definition() != before


def test_completions_are_kept_byte_for_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = row(prompt="def f():\n", completion="\n    return 1\n")
    ids, targets = tokenised([wanted], tokenizer, FORMATS["completion"]).sample(0)
    assert tokenizer.decode(ids[targets][:-1]) == "\n    return 1\n"
    assert tokenizer.decode(ids[~targets], skip_special_tokens=True) == "def f():\n"


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=20
        ).filter(str.strip),
        min_size=2,
        max_size=7,
    )
)
def test_every_assistant_turn_is_a_target_up_to_its_end_and_nothing_else_is(
    chatty: PreTrainedTokenizerFast, turns: list[str]
) -> None:
    dataset = tokenised([chat(*turns)], chatty, FORMATS["chat"])
    ids, targets = dataset.sample(0)
    changes = np.flatnonzero(np.diff(targets.astype(int), prepend=0, append=0))
    runs = [chatty.decode(ids[a:b]) for a, b in changes.reshape(-1, 2)]
    answers = turns[1::2]
    end = "<|im_end|>" if "im_start" in chatty.chat_template else " </s>"
    start = "" if "im_start" in chatty.chat_template else " "
    assert runs == [f"{start}{answer}{end}" for answer in answers]
    whole = chatty.apply_chat_template(chat(*turns[: 2 * len(answers)]).fields["messages"])["input_ids"]
    assert ids.tolist() == whole, "the tokens are those of the template, no BOS more"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(messages="hello"), "field 'messages' must be a list"),
        (row(messages=[]), "field 'messages' must be a list"),
        (row(messages=["hello"]), "message 1 must have a role"),
        (row(messages=[{"role": "boss", "content": "x"}]), "message 1 must have a role, one of system, user"),
        (row(messages=[{"role": "user", "content": None}]), "message 1's content is None"),
        (chat("question"), "hold no assistant turn"),
        (chat("answer", "question", first="assistant"), "hold no assistant turn after another"),
        (chat("q", "now <|im_end|> it ends"), "message 2 holds the tokenizer's special token '<|im_end|>'"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_named(
    bad: Row, message: str, chatty: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UnfitRowError, match=f"rows.jsonl, line 1: .*{re.escape(message)}"):
        FORMATS["chat"].text(bad, chatty)


def test_a_template_that_refuses_or_rewrites_is_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(ModelError, match="needs a chat template, and the tokenizer"):
        tokenised([chat("q", "a")], copy, FORMATS["chat"])
    copy.chat_template = LLAMA2
    twice = row(messages=[{"role": "user", "content": "q"}] * 2 + [{"role": "assistant", "content": "a"}])
    with pytest.raises(UnfitRowError, match=r"the chat template refuses it \(roles must alternate"):
        FORMATS["chat"].text(twice, copy)
    copy.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UnfitRowError, match="writes earlier turns in another way"):
        FORMATS["chat"].text(chat("q", "a"), copy)


def test_the_real_rows_of_both_papers_data_sets_fit(
    data_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, format, count in (
        ("metamathqa/metamathqa-40k.excerpt.jsonl", "metamathqa", 10),
        ("metamathqa/metamathqa.transcribed.jsonl", "metamathqa", 5),
        ("codefeedback/codefeedback-filtered-instruction.excerpt.jsonl", "codefeedback", 1),
    ):
        assert len(tokenised(read_file(data_dir / name), tokenizer, FORMATS[format])) == count
    upstream = [
        line.fields for line in read_file(data_dir / "codefeedback" / "codefeedback-upstreams.excerpt.jsonl")
    ]
    assert len(FORMATS["chat"].text(row(**upstream[0]["row"]), _with_template(tokenizer)).prompts) == 2


def _with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    copy.chat_template = CHATML
    return copy
