"""From a completion to its answer: the number of a word problem, or the answer to a MATH problem."""

import re
from dataclasses import dataclass

from dynrank_eval.answers.numbers import Reading, last_number, read_number
from dynrank_eval.answers.reply import final_reply
from dynrank_eval.answers.statements import stated_answer, up_to_next_problem

_SEGMENT = re.compile(
    r"\\\[(.+?)\\\]|\$\$(.+?)\$\$|\\\((.+?)\\\)|(?<!\\)\$(?!\s*[0-9.,]+\s*(?:[A-Za-z]{3,}|[.,;]?$))(.+?)(?<!\\)\$",
    re.DOTALL,
)
_JOINT = re.compile(r"\s*(?:,|;)?\s*(?:and|or|,|;)?\s*")
_SENTENCE_END = re.compile(r"(?<=[^\s.])\.(?:\s|$)|[!?](?:\s|$)")
_REMARK = re.compile(
    r"\s*\((?:which|that|since|because|i\.e|e\.g|where|as|or|in|the|see|rounded|approximately)\b[^()]*\)"
    r"|\s*,?\s+\b(?:which|because|since|where|so that|as (?:we|the|it|required|desired|shown)|when|if)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_DASH_REMARK = re.compile(
    r"\s+[-\N{EN DASH}\N{EM DASH}]+\s+(?!sqrt|sin|cos|tan|log|ln|pi\b)[A-Za-z]{2,}.*", re.DOTALL
)
_LONGEST_BARE_REPLY = 80


@dataclass(frozen=True)
class NumberAnswer:
    """The answer to a word problem: as it stands, and read."""

    text: str
    reading: Reading


def number_answer(completion: str) -> NumberAnswer | None:
    """Return the answer that a completion states, else its last number; None where it has no number."""
    reply = final_reply(completion)
    text = stated_answer(reply, lambda candidate: read_number(candidate) is not None)
    if text is not None:
        boxed = f"{{{text}}}" in reply
        reading = read_number(text) if boxed else _exclaimed(text)
        assert reading is not None
        return NumberAnswer(text, reading)
    reading = last_number(up_to_next_problem(reply))
    return None if reading is None else NumberAnswer(str(reading), reading)


def _exclaimed(text: str) -> Reading | None:
    """Read a number that may end its sentence with "!": 5! is 120 or 5, and no answer in words is 18 factorial."""
    calm = text.rstrip("!. ")
    if "!" not in text[len(calm) :] or not calm[-1:].isdigit():
        return read_number(text)
    plain, factorial = read_number(calm), read_number(text)
    if plain is None or factorial is None or not all(abs(value) < 10 for value in plain.values):
        return plain
    return Reading(plain.values | factorial.values)


def math_answer(completion: str) -> str | None:
    """Return the answer that a completion states, or the whole of a reply that is nothing but an answer."""
    reply = final_reply(completion)
    text = stated_answer(reply, lambda candidate: re.search("[A-Za-z0-9]", trimmed(candidate)) is not None)
    if text is not None:
        return trimmed(text)
    bare = up_to_next_problem(reply).strip()
    if "boxed" in bare or "\n" in bare or len(bare) > _LONGEST_BARE_REPLY or not re.search(r"[0-9\\]", bare):
        return None
    return trimmed(bare) if len(re.findall("[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", bare))) <= 2 else None


def trimmed(text: str) -> str:
    """Return a stated answer without its explanation, its sentence's end and the words around its formulas."""
    text = text.strip()
    segments = list(_SEGMENT.finditer(text))
    if segments and (not text[: segments[0].start()].strip(" *_:") or re.match(r"[*_\s]*[A-Za-z]", text)):
        return _formulas(text, segments)
    end = _SENTENCE_END.search(text)
    if end and text.count("{", 0, end.start()) <= text.count("}", 0, end.start()):
        text = text[: end.start()]
    text = _DASH_REMARK.sub("", _REMARK.sub("", text))
    return re.sub(r"(?:\\[,;:! ]|[.,;\s])+$", "", text).strip("*_` ")


def _formulas(text: str, segments: list["re.Match[str]"]) -> str:
    """Join the formulas that a text begins with, or take the last of a sentence that leads to one."""
    inside = [next(group for group in segment.groups() if group is not None) for segment in segments]
    if text[: segments[0].start()].strip(" *_:"):
        return inside[-1].strip()
    joined = [inside[0].strip()]
    for before, after, formula in zip(segments, segments[1:], inside[1:], strict=False):
        between = text[before.end() : after.start()]
        if not between.strip() or not _JOINT.fullmatch(between):
            break
        joined.append(formula.strip())
    rest = text[segments[0].end() :]
    unit = (
        re.match(r"\s*(?:\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?[0-9]\}?)?|[%°])", rest)
        if len(joined) == 1
        else None
    )
    return ", ".join(joined) + (unit.group() if unit else "")
