"""What EvalPlus keeps of a generated program (0.3.1, sanitize.py), found by Python's own parser, not tree-sitter.

Of prompt and completion the longest run of lines that is valid Python; of that the imports, and the definitions that
the asked functions need. So prose, fences, a definition that was cut off and calls at the top level do no harm.
"""

import ast
import warnings
from collections.abc import Iterable, Iterator, Sequence

# Far beyond what a model writes for one function. EvalPlus, without bounds, would try every pair of lines.
_LONGEST_COMPLETION = 50_000
_MOST_TRIALS = 500
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def sanitize(prompt: str, completion: str, names: Iterable[str]) -> str:
    """Return the program in `prompt` + `completion` that defines `names`; empty where the completion adds nothing."""
    lines = (prompt + completion[:_LONGEST_COMPLETION]).split("\n")
    first, last = longest_valid(lines)
    if not any(line.strip() for line in lines[prompt.count("\n") : last]):
        return ""
    return _needed(lines[first:last], names)


def longest_valid(lines: Sequence[str]) -> tuple[int, int]:
    """Return the half-open range of valid lines with the most that are not blank; of equals the first."""
    written = [0]
    for line in lines:
        written.append(written[-1] + bool(line.strip()))
    best, trials = (0, 0), 0
    for first in range(len(lines)):
        last = len(lines)
        while written[last] - written[first] > written[best[1]] - written[best[0]] and trials < _MOST_TRIALS:
            trials += 1
            error = _first_error(lines[first:last])
            if error is None:
                best = (first, last)
            else:
                # A range that holds the line of the error has the same error.
                last = min(last - 1, first + error)
    return best


def _first_error(lines: Sequence[str]) -> int | None:
    """Count the `lines` before the one that is no valid Python; None where all are."""
    try:
        _parse("\n".join(lines))
    except NOT_PYTHON as error:
        line = getattr(error, "lineno", None)
        return len(lines) if line is None else max(line - 1, 0)
    return None


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        # "invalid escape sequence": the model's, and no concern of the user's.
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _needed(lines: Sequence[str], names: Iterable[str]) -> str:
    """Return imports, then what `names` reach from definition to definition; empty where none is defined."""
    body = _parse("\n".join(lines)).body
    definitions = _definitions(body)
    reached: dict[str, None] = {}
    waiting = [name for name in names if name in definitions]
    while waiting:
        name = waiting.pop()
        reached[name] = None
        waiting += identifiers(definitions[name]) & definitions.keys() - reached.keys()
    if not reached:
        return ""
    imports = _lines_of(node for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    kept = _lines_of(definitions[name] for name in reached)
    return "".join(lines[place] + "\n" for place in [*sorted(imports), *sorted(kept - imports)])


def _definitions(body: Iterable[ast.stmt]) -> dict[str, _Definition]:
    """Return of each name the first definition that returns something, else the first: a prompt's stub is none."""
    found: dict[str, _Definition] = {}
    for node in body:
        if isinstance(node, _Definition):
            for name in _defined(node):
                if name not in found or (_is_stub(found[name]) and not _is_stub(node)):
                    found[name] = node
    return found


def _defined(node: _Definition) -> Iterator[str]:
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        yield node.name
        return
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def _is_stub(node: _Definition) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any(
        isinstance(part, ast.Return) for part in ast.walk(node)
    )


def identifiers(node: ast.AST) -> set[str]:
    """Return every name in a node, whatever it stands for."""
    return {
        value
        for part in ast.walk(node)
        if not isinstance(part, ast.Constant)
        for _, field in ast.iter_fields(part)
        for value in (field if isinstance(field, list) else [field])
        if isinstance(value, str)
    }


def _lines_of(nodes: Iterable[ast.stmt]) -> set[int]:
    """Return the places of the nodes' lines, with those of decorators."""
    places: set[int] = set()
    for node in nodes:
        starts = [node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]
        places |= set(range(min(starts) - 1, node.end_lineno or node.lineno))
    return places
