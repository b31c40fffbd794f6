"""Which package of a source tree imports which, read from the files without importing them.

python -m tests.support.imports [FOLDER]      packages, layers, imports and cycles
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

Imports = dict[str, set[str]]
"""Package or top-level module -> those of the same tree that it imports anywhere, inside functions too."""


def read_imports(package: Path) -> Imports:
    """The imports between the parts of `package`: its folders with Python files, and the modules beside them."""
    known = {path.stem for path in package.glob("*.py")} | {
        p.parent.name for p in package.glob("*/__init__.py")
    }
    imports: Imports = {part: set() for part in known - {"__init__"}}
    for file in package.rglob("*.py"):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        if part in imports:
            imports[part] |= {name for name in _imported(file, package.name) if name in imports} - {part}
    return imports


def _imported(file: Path, package: str) -> Iterator[str]:
    """The parts of `package` that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            above, *below = name.split(".")
            if above == package and below:
                yield below[0]


def cycles(imports: Mapping[str, set[str]]) -> list[set[str]]:
    """The groups of parts of which each imports every other, through others too."""
    reached = {part: _reachable(part, imports) for part in imports}
    groups = {frozenset(p for p in reached[part] if part in reached[p]) for part in imports}
    return [set(group) for group in groups if group]


def _reachable(part: str, imports: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = set(imports[part])
    while waiting:
        found |= waiting
        waiting = {name for one in waiting for name in imports[one]} - found
    return found


def layers(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """The parts from the bottom up: each imports only what is in layers below it. There must be no cycle."""
    placed: list[list[str]] = []
    left = dict(imports)
    while left:
        layer = sorted(part for part, below in left.items() if not below & set(left))
        assert layer, f"a cycle among {sorted(left)}"
        placed.append(layer)
        left = {part: below for part, below in left.items() if part not in layer}
    return placed


if __name__ == "__main__":
    found = read_imports(Path(sys.argv[1] if len(sys.argv) > 1 else "dynrank_ds"))
    print(f"{len(found)} packages and modules, {sum(map(len, found.values()))} imports between them")
    print(f"cycles: {cycles(found) or 'none'}")
    if not cycles(found):
        for number, layer in enumerate(layers(found), start=1):
            print(
                number,
                *(f"{part} -> {', '.join(sorted(found[part])) or 'nothing'}" for part in layer),
                sep="\n    ",
            )
