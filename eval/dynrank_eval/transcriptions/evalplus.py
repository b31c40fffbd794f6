"""EvalPlus 0.3.1, sanitize.py: what it keeps of a program, by Python's own parser instead of tree-sitter."""

import ast
from collections.abc import Iterable, Iterator, Sequence

from dynrank_eval.sanitizing import identifiers, longest_valid

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def sanitize(code: str, names: Sequence[str]) -> str:
    """Return the imports, and the plain definitions that `names` reach; where none is left, all valid lines.

    It drops decorated definitions, functions without a return statement, conditions, loops, `from __future__`, and
    statements that change a table.
    """
    lines = code.split("\n")
    first, last = longest_valid(lines)
    if last - first < 2:
        # It tries no range of a single line, and then keeps the first line.
        first, last = 0, 1
    extracted = "\n".join(lines[first:last])
    try:
        body = ast.parse(extracted).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return extracted
    kept = "\n".join(_kept(extracted, body, names)).strip()
    return kept or extracted


def _kept(source: str, body: Iterable[ast.stmt], names: Sequence[str]) -> Iterator[str]:
    imports, definitions = [], {}
    for node in body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            imports.append(node)
        elif (name := _defined(node)) is not None and name not in definitions:
            definitions[name] = node
    reached, waiting = set(names), list(names)
    while waiting:
        name = waiting.pop()
        for other in identifiers(definitions[name]) - reached if name in definitions else ():
            reached.add(other)
            waiting.append(other)
    for node in [*imports, *(node for name, node in definitions.items() if name in reached)]:
        yield ast.get_source_segment(source, node) or ""


def _defined(node: ast.stmt) -> str | None:
    """Return the name under which EvalPlus files a definition; None where it drops the statement."""
    if isinstance(node, ast.ClassDef):
        return None if node.decorator_list else node.name
    if isinstance(node, _Function):
        returns = any(isinstance(part, ast.Return) for part in ast.walk(node))
        return node.name if returns and not node.decorator_list else None
    if isinstance(node, ast.Assign):
        # The first plain name among the statement's parts: of "a, b = c" that is c.
        return next((part.id for part in [*node.targets, node.value] if isinstance(part, ast.Name)), None)
    if isinstance(node, ast.AnnAssign):
        return next((part.id for part in (node.target, node.value) if isinstance(part, ast.Name)), None)
    return None
