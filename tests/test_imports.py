"""Packages import downward only; `python -m tests.support.imports` prints what imports what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.imports import cycles, layers, read_imports

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up. What is in one row may import only what is in the rows above it here.
_LAYERS = (
    ("documents", "dtypes", "errors", "hub", "prompts", "section", "shared_disk"),
    ("composing", "files", "ranking", "tensorfile"),
    ("adapters", "base_weights", "quantised_layers"),
    ("data", "methods", "zero"),
    ("checkpoint", "recipe_mistakes", "recipe_sections"),
    ("recipe",),
    ("export", "report"),
    ("training",),
    ("planning",),
    ("bench", "commands", "integrations"),
    ("study",),
    ("cli",),
)


def test_packages_of_dynrank_ds_import_only_those_of_lower_layers() -> None:
    height = {part: number for number, layer in enumerate(_LAYERS) for part in layer}
    imports = read_imports(ROOT / "dynrank_ds")
    unplaced = set(imports) - set(height)
    assert not unplaced, f"give {', '.join(sorted(unplaced))} a place in _LAYERS"
    upward = [f"{a} -> {b}" for a, below in imports.items() for b in sorted(below) if height[b] >= height[a]]
    assert not upward


@pytest.mark.parametrize("package", ["dynrank_ds", "eval/dynrank_eval"])
def test_no_packages_import_each_other_in_a_cycle(package: str) -> None:
    assert cycles(read_imports(ROOT / package)) == []


def test_evaluator_imports_no_training_code() -> None:
    allowed = {
        "dynrank_ds.dtypes",
        "dynrank_ds.errors",
        "dynrank_ds.hub",
        "dynrank_ds.files",
        "dynrank_ds.prompts",
    }
    imported = set()
    for file in (ROOT / "eval/dynrank_eval").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "dynrank_ds":
                imported |= {f"dynrank_ds.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
    assert {name for name in imported if name.startswith("dynrank_ds")} <= allowed


def test_deepspeed_is_imported_only_in_zero() -> None:
    importing = set()
    for file in (ROOT / "dynrank_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "deepspeed" for name in names):
                importing.add(file.relative_to(ROOT / "dynrank_ds").parts[0])
    assert importing == {"zero"}


def test_cycles_and_layers_are_found_in_a_small_tree(tmp_path: Path) -> None:
    texts = {
        "low.py": "",
        "middle/__init__.py": "",
        "middle/one.py": "from tree.low import x\nimport os",
        "high.py": "def f():\n    import tree.middle.one",
    }
    for name, text in texts.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = read_imports(tmp_path / "tree")
    assert imports == {"low": set(), "middle": {"low"}, "high": {"middle"}}
    assert layers(imports) == [["low"], ["middle"], ["high"]]
    (tmp_path / "tree/low.py").write_text("from tree import high")
    assert cycles(read_imports(tmp_path / "tree")) == [{"low", "middle", "high"}]
