r"""Finds the answer that a reply states: after "answer is", "####" or in \boxed{}; the last statement counts."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dynrank_eval.extraction import balanced_end

_LONGEST_ANSWER = 2_000
_MOST_STATEMENTS = 50
_MARKER = re.compile(
    r"\banswers?\b[*_\s]*(?:\([^()\n]{0,40}\)\s*)?"
    r"(?:(?:to|of|for|in|from|that|we)\b[^.\n:=]{0,80}?)?"
    r"(?:\b(?:is|are|was|would be|should be|will be|must be|equals|comes out to|becomes)\b[*_ \t]*"
    r"(?:\n?[ \t]*:)?|[:=])[*_]*"
    r"|(?:^|\n)[ \t]*(?:#{1,6}[ \t]+|\*\*)(?:the[ \t]+)?(?:final[ \t]+)?answer[*_ \t]*(?=\n)"
    r"|####(?!#)",
    re.IGNORECASE,
)
# "Let me verify the answer: 3 + 4 = 7" states no answer.
_VERIFYING = re.compile(
    r"\b(?:verif|(?:double[ -])?check|confirm|validat|test|justif|explain|explanation|prov(?:e|ing)\b|proof)\w*\s+"
    r"(?:of\s+|that\s+|if\s+|whether\s+)?(?:the|my|this|that|our|your)\s+(?:final\s+)?$",
    re.IGNORECASE,
)
_LONGEST_LEAD = 60
_BOX = re.compile(r"\\f?boxed(?![A-Za-z])|\\fbox(?![A-Za-z])")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_REMARK = re.compile(
    r"[*_\s]*(?:(?:also|indeed|therefore|thus|then|probably|clearly|actually|really|definitely|likely|still|now|both|"
    r"very|quite|most)\s+)*"
    r"(?:not\b(?!\s+enough)|n't|correct\b|right\b|wrong\b|incorrect\b|reasonable\b|consistent\b|valid\b|verified\b|confirmed\b|"
    r"plausible\b|sensible\b|accurate\b|unique\b|obvious\b|unclear\b|unknown\b|given by\b|found by\b|as follows\b|"
    r"supposed to\b|expected to\b|in the (?:form|format)\b|asked\b|needed\b|required\b|rounded\b|checked\b|ready\b)",
    re.IGNORECASE,
)
_FILLERS = re.compile(
    r"[*_\s]*(?:(?:therefore|thus|then|hence|simply|just|exactly|equal to|equals|approximately|about|clearly|that|"
    r"indeed)[,:]?\s+)+",
    re.IGNORECASE,
)
_NEW_PROBLEM = re.compile(
    r"^[ \t]*(?:\*\*)?(?:(?:(?:Next|New|Another)[ \t]+)?(?:Q|(?i:question|problem)|Exercise|Example|Task)[ \t]*"
    r"[0-9]*[ \t]*[:.)]|"
    r"#+[ \t]*(?:Instruction|Question|Problem|Input|Response)\b|"
    r"(?:USER|User|Human|Instruction|Input)[ \t]*:|Below is an instruction\b)",
    re.MULTILINE,
)
_WORD_FIRST = re.compile(r"[*_]*[A-Za-z]+")
_BULLET = re.compile(r"[ \t]*(?:[-*•>]|[0-9]+[.)])[ \t]+(?=\S)")
_DISPLAYS = (("\\[", "\\]"), ("$$", "$$"), ("\\begin{", "\\end{"))


@dataclass(frozen=True)
class _Statement:
    place: int
    text: str


def stated_answer(reply: str, acceptable: Callable[[str], bool]) -> str | None:
    """Return the last stated answer that is acceptable, before the model goes on to another problem.

    Args:
        reply: what `final_reply` gives.
        acceptable: whether a text can be an answer at all: a remark that "this answer is correct" is passed over.
    """
    found = [statement for statement in _statements(reply) if acceptable(statement.text)]
    if not found:
        return None
    next_problem = _NEW_PROBLEM.search(reply, found[0].place)
    end = len(reply) if next_problem is None else next_problem.start()
    return [statement for statement in found if statement.place <= end][-1].text


def up_to_next_problem(reply: str) -> str:
    """Return a reply that states no answer up to where the model goes on to another problem."""
    for found in _NEW_PROBLEM.finditer(reply):
        if reply[: found.start()].strip():
            return reply[: found.start()]
    return reply


def _statements(reply: str) -> Iterator[_Statement]:
    # "####" before words may be a heading of Markdown's: it states an answer where nothing else does.
    found: list[_Statement] = []
    headings: list[_Statement] = []
    for match in _ends(list(_BOX.finditer(reply))):
        if text := _boxed(reply, match.end()):
            found.append(_Statement(match.start(), text))
    for match in _ends(list(_TAGGED.finditer(reply))):
        if not _BOX.search(match[1]):
            found.append(_Statement(match.start(1), match[1].strip()))
    ends = {statement.place: statement.place + len(statement.text) for statement in found}
    for match in _ends(list(_MARKER.finditer(reply))):
        if any(start < match.start() < end for start, end in ends.items()):
            continue
        if _VERIFYING.search(reply[max(0, match.start() - _LONGEST_LEAD) : match.start()]):
            continue
        content = _content(reply[match.end() : match.end() + _LONGEST_ANSWER])
        # A box is a statement itself, of just the answer.
        if content and not _BOX.search(content) and not _REMARK.match(content):
            heading = match.group().endswith("####") and _WORD_FIRST.match(content) is not None
            (headings if heading else found).append(_Statement(match.start(), content))
    yield from sorted(found or headings, key=lambda statement: statement.place)


def _ends(matches: list["re.Match[str]"]) -> list["re.Match[str]"]:
    """Return the first and the last of very many: a reply that repeats itself says nothing new in between."""
    return [*matches[:_MOST_STATEMENTS], *matches[_MOST_STATEMENTS:][-_MOST_STATEMENTS:]]


def _boxed(reply: str, start: int) -> str | None:
    tail = reply[start : start + _LONGEST_ANSWER]
    inside = tail.lstrip()
    if inside.startswith("{"):
        end = balanced_end(inside)
        return None if end is None else inside[1:end].strip() or None
    bare = re.match(r"\s+([^\s$]+)", tail)
    return bare[1] if bare else None


def _content(tail: str) -> str:
    """Return the answer after a marker: the rest of its line, or the next line or display where that is empty."""
    below = re.match(r"[ \t\r:*_]*\n\s*", tail)
    if below and (bullet := _BULLET.match(tail, below.end())):
        tail = tail[bullet.end() :]
    tail = _TAGGED.sub(r"\1", tail).lstrip(" \t\r\n:*_")
    filler = _FILLERS.match(tail)
    if filler:
        tail = tail[filler.end() :].lstrip(" \t\r\n:")
    for opening, closing in _DISPLAYS:
        if tail.startswith(opening):
            end = tail.find(closing, len(opening))
            if end >= 0:
                line_end = tail.find("\n", end)
                return tail[: line_end if line_end >= 0 else len(tail)].strip()
    lines = tail.split("\n")
    answer = lines[0]
    for line in lines[1:]:
        if answer.count("{") <= answer.count("}") and answer.count("\\begin") <= answer.count("\\end"):
            break
        answer += "\n" + line
    return answer.strip()
