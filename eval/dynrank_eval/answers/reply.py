"""What a model says to the user: its completion without thoughts and without tokens of the chat format."""

import re

_TAG = re.compile(
    r"<(?P<close>/?)(?:seed:)?(?:think|thinking|thought|reasoning|scratchpad)>"
    r"|\[(?P<close_bracket>/?)THINK\]"
    r"|◁(?P<close_symbol>/?)think▷"
    r"|<\|(?:begin|(?P<close_token>end))_of_thought\|>",
    re.IGNORECASE,
)
_END_OF_TURN = re.compile(
    r"<\|(?:eot_id|eom_id|im_end|endoftext|end_of_text|endofmask|end_of_turn|end|eot|return|user)\|>"
    r"|<end_of_turn>|<start_of_turn>user|<\|im_start\|>user|<eos>|</s>(?=\s*(?:\Z|<s>|\n))"
    r"|(?<=\S)\s*\[/?INST\]",
    re.IGNORECASE,
)
# gpt-oss' format: what is not in the last channel is a thought.
_FINAL_CHANNEL = re.compile(r"<\|channel\|>\s*final\s*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_ANY_CHANNEL = re.compile(r"<\|channel\|>\s*\w+\s*<\|message\|>")
_OPENING = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>"
    r"|<\|im_start\|>\s*assistant\b|<start_of_turn>\s*model\b)"
)


def final_reply(completion: str) -> str:
    """Return a completion without its thoughts, up to its first end-of-turn token.

    A thought that is never closed leaves nothing. A closing tag without an opening one closes a thought that the
    chat template opened.
    """
    text = completion
    if _ANY_CHANNEL.search(text):
        *_, text = _FINAL_CHANNEL.split(text) if _FINAL_CHANNEL.search(text) else [""]
    while opening := _OPENING.match(text):
        text = text[opening.end() :]
    text = _without_thoughts(text)
    end = _END_OF_TURN.search(text)
    return text[: end.start()] if end else text


def _without_thoughts(text: str) -> str:
    kept: list[str] = []
    start, inside = 0, False
    for tag in _TAG.finditer(text):
        if any(tag.groups()):
            if not inside:
                kept.clear()
            start, inside = tag.end(), False
        elif not inside:
            kept.append(text[start : tag.start()])
            inside = True
    if not inside:
        kept.append(text[start:])
    return "".join(kept)
