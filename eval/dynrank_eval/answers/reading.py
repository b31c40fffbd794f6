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
# What follows a factorial goes on: "14! ways", "14! / 2".
_SENTENCE_END = re.compile(r"(?<=[^\s.])\.(?:\s|$)|\?(?:\s|$)|!(?=\s+[A-Z])")
_FORMULA_END = re.compile(r"!\s*(?:\$|\\[)\]])")
_OPERAND_AT_END = re.compile(r"(?:[0-9)}]|(?<![A-Za-z])[A-Za-z])$")
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
        reading = read_number(text) if _is_boxed(text, reply) else _exclaimed(text)
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


def math_answers(completion: str) -> tuple[str, ...]:
    """Return the answer that a completion states, or the whole of a reply that is nothing but an answer.

    Returns:
        The ways to read it: nothing where there is no answer, two where a sentence ends in "14!", which is 14
        with an exclamation mark or 14 factorial. In a box or a formula it is the factorial.
    """
    reply = final_reply(completion)
    text = stated_answer(reply, lambda candidate: re.search("[A-Za-z0-9]", trimmed(candidate)) is not None)
    if text is None:
        text = _bare_answer(up_to_next_problem(reply).strip())
    if text is None:
        return ()
    answer = trimmed(text)
    calm = answer.rstrip("! ")
    if calm == answer:
        return (answer,)
    if _OPERAND_AT_END.search(calm) is None:
        return (calm,)
    return (answer,) if _is_boxed(text, reply) or _FORMULA_END.search(text) else (calm, answer)


def _is_boxed(text: str, reply: str) -> bool:
    return f"{{{text}}}" in reply


def _bare_answer(reply: str) -> str | None:
    if (
        "boxed" in reply
        or "\n" in reply
        or len(reply) > _LONGEST_BARE_REPLY
        or not re.search(r"[0-9\\]", reply)
    ):
        return None
    words = re.findall("[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", reply))
    return reply if len(words) <= 2 else None


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
