"""From a reply to the program in it, whatever its form: a continuation of the prompt, a whole program, fenced blocks.

For the protocols `dynrank-code-v1` and `chat-v2`. Nothing of a program is left out, so that tables, optional imports
and helpers work as in plain Python; what does not belong to a program (prose, usage blocks, a torn end) is.
"""

import ast
import builtins
import html
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence

from dynrank_eval.answers.reply import final_reply
from dynrank_eval.sanitizing import NOT_PYTHON, longest_valid

_LONGEST_REPLY = 50_000
_FENCE = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^`\s]*)[^`]*$")
_INLINE_FENCE = re.compile(r"`{3}(?:python3?|py)?[ \t]+(?P<code>[^`\n]+)`{3}")
_HTML_BLOCK = re.compile(
    r"^[ \t]*<pre[^>]*>\s*(?:<code[^>]*>)?(.*?)(?:</code>\s*)?</pre>", re.M | re.S | re.I
)
_QUOTED = re.compile(r"[ \t]*>")
_INDENTATION = re.compile("^[ \t\u00a0\u2000-\u200a\u202f\u3000]+", re.MULTILINE)
_TAG = re.compile(r"^[ \t]*\[/?(?:PYTHON|CODE|BEGIN|DONE|END|SOLUTION|ANSWER)\][ \t]*$", re.MULTILINE)
_PROMPTED = re.compile(r"^[ \t]*>>> (?=def |class |from |import |@)", re.MULTILINE)
_FUTURE = re.compile(r"^from\s+__future__\s+import\b.*$", re.MULTILINE)
_LIST_ITEM = re.compile(r"[ \t>]*(?:(?:[-*+]|[0-9]+[.)])[ \t]+)?")


def program(prompt: str, completion: str, names: Sequence[str]) -> str:
    """Return the program in a completion that defines one of `names`; empty where there is none.

    prompt: the code that the program continues or repeats; empty where the prompt was no code.
    """
    reply = _cleaned(final_reply(completion)[:_LONGEST_REPLY])
    chosen = (
        _from_blocks(prompt, _blocks(reply), names)
        or _unfenced(prompt, reply, names)
        or _from_blocks(prompt, [html.unescape(block) for block in _HTML_BLOCK.findall(reply)], names)
    )
    return _assembled(prompt, chosen) if chosen else ""


def _cleaned(reply: str) -> str:
    """Return a reply with ASCII indentation, without tags of templates and without an interpreter's prompts."""
    reply = _INDENTATION.sub(lambda run: re.sub(r"[^ \t]", " ", run.group()), reply.replace("\ufeff", ""))
    reply = _TAG.sub("", reply)
    if _PROMPTED.search(reply):
        lines = reply.split("\n")
        reply = "\n".join(re.sub(r"^[ \t]*(?:>>>|\.\.\.) ?", "", line) for line in lines)
    return reply


def _from_blocks(prompt: str, blocks: Sequence[str], names: Sequence[str]) -> str:
    """Return the last block that defines one of `names`, with the blocks before and after that it needs.

    The last, as for answers: a model that corrects itself does so afterwards. Stubs, and blocks that only try
    the function out, are passed over.
    """
    valid = [block for block in map(_valid_part, blocks) if block]
    solving = [place for place, block in enumerate(valid) if _solves(block, names)]
    if not solving:
        bodies = (_continued(prompt, block, names) for block in reversed(blocks)) if prompt else iter(())
        return next((body for body in bodies if body), "")
    chosen = valid[solving[-1]]
    kept = [chosen]
    for place in reversed([place for place in range(len(valid)) if place not in solving]):
        missing = _used(chosen) - _top_level(chosen) - set(dir(builtins))
        if missing & _top_level(valid[place]):
            kept.insert(0, valid[place])
            chosen = "\n".join(kept)
    return "\n".join(kept)


def _unfenced(prompt: str, reply: str, names: Sequence[str]) -> str:
    """Return the program in a text without fences: a continuation of the prompt, or one among prose."""
    text = _before_fence(reply)
    candidates = [_continued(prompt, text, names)] if prompt else []
    candidates += [_valid_part(text), _valid_part(reply)]
    return next(
        (candidate for candidate in candidates if candidate and _solves(candidate, names)), ""
    ) or next((candidate for candidate in candidates[:1] if candidate), "")


def _continued(prompt: str, text: str, names: Sequence[str]) -> str:
    """Return prompt and continuation up to the last valid line; empty where the continuation adds nothing."""
    shapes = (
        text,
        text.expandtabs(4),
        textwrap.indent(textwrap.dedent(text), "    "),
        # The first line without the space that a tokenizer took.
        "    " + text.lstrip(),
    )
    begun = prompt.count("\n")
    stub, solving = "", []
    for body in shapes:
        lines = (prompt + body).split("\n")
        first, last = longest_valid(lines)
        if first < begun < last and any(line.strip() for line in lines[begun:last]):
            whole = "\n".join(lines[first:last]) + "\n"
            if _solves(whole, names):
                solving.append(whole)
            elif body is text and _defines(whole, names):
                stub = whole
    # Of several the first that keeps most of the text.
    return max(solving, key=lambda whole: len(whole.split()), default=stub)


def _blocks(reply: str) -> list[str]:
    """Return the contents of fenced blocks (``` or ~~~, indented or in lists, the last one perhaps not closed)."""
    blocks: list[str] = []
    lines: list[str] = []
    open_fence, quoted = "", False
    for line in reply.split("\n"):
        match = _FENCE.match(line)
        if open_fence:
            line = _QUOTED.sub("", line, count=1) if quoted else line
            match = _FENCE.match(line)
            closing = match and match["fence"].startswith(open_fence) and not match["language"]
            if closing and match and not _LIST_ITEM.sub("", match["before"], count=1).strip():
                blocks.append(_dedented(lines))
                open_fence, lines = "", []
            else:
                lines.append(line)
        elif inline := _INLINE_FENCE.search(line):
            blocks.append(inline["code"] + "\n")
        elif match and (match["language"] or not _LIST_ITEM.sub("", match["before"], count=1).strip()):
            open_fence, quoted = match["fence"], _QUOTED.match(match["before"]) is not None
    if open_fence:
        blocks.append(_dedented(lines))
    return blocks


def _dedented(lines: Iterable[str]) -> str:
    return textwrap.dedent("\n".join(lines)) + "\n"


def _before_fence(reply: str) -> str:
    kept: list[str] = []
    for line in reply.split("\n"):
        if re.match(r"\s*(?:```|~~~)", line):
            if any(kept_line.strip() for kept_line in kept):
                break
            continue
        kept.append(line)
    return "\n".join(kept)


def _valid_part(text: str) -> str:
    """Return the text where it is a valid module, else its longest run of valid lines."""
    if _tree(text) is not None:
        return text
    lines = text.split("\n")
    first, last = longest_valid(lines)
    part = "\n".join(lines[first:last])
    return part + "\n" if part.strip() else ""


def _tree(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Compiled too: "return" outside a function parses.
            # `_assembled` puts imports from __future__ first.
            compile(_FUTURE.sub("", source), "<reply>", "exec", dont_inherit=True)
            return ast.parse(source)
    except NOT_PYTHON:
        return None


def _solves(source: str, names: Sequence[str]) -> bool:
    """Whether the source defines one of `names` by more than a stub."""
    tree = _tree(source)
    return tree is not None and any(
        name in names for name, node in _definitions(tree.body) if not _is_stub(node)
    )


def _defines(source: str, names: Sequence[str]) -> bool:
    tree = _tree(source)
    return tree is not None and any(name in names for name, _ in _definitions(tree.body))


def _definitions(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield what statements at the top level define, in conditions and try blocks too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield (alias.asname or alias.name).split(".")[0], node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id, node
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, field, ()) or ())
            for handler in getattr(node, "handlers", ()):
                yield from _definitions(handler.body)


def _is_stub(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.AnnAssign) and not node.value
        )
    return all(_says_nothing(statement) for statement in node.body)


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        return "NotImplementedError" in ast.dump(statement)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _top_level(source: str) -> set[str]:
    return {name for name, _ in _definitions(ast.parse(source).body)}


def _used(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def _assembled(prompt: str, chosen: str) -> str:
    """Put the prompt's imports and helpers before a program that does not begin with it, __future__ before all."""
    source = chosen
    if prompt and not chosen.startswith(prompt.rstrip()) and _tree(prompt) is not None:
        source = prompt.rstrip("\n") + "\n\n\n" + chosen
    future = _FUTURE.findall(source)
    return "".join(f"{line}\n" for line in dict.fromkeys(future)) + _FUTURE.sub("", source)
