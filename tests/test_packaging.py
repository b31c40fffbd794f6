"""The wheel that a user installs, built from a copy of the source tree without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SOURCES = ("dynrank_ds", "eval", "recipes", "ds_configs", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
# Folder of the source tree -> where the wheel has it.
_PLACES = {
    "dynrank_ds": "dynrank_ds",
    "eval/dynrank_eval": "dynrank_eval",
    "recipes": "dynrank_ds/recipes",
    "ds_configs": "dynrank_ds/ds_configs",
}
_BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree = tmp_path_factory.mktemp("tree")
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    built = subprocess.run(
        [sys.executable, "-c", _BUILD, str(tree)], cwd=tree, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr[-4000:]
    (file,) = tree.glob("*.whl")
    return zipfile.ZipFile(file)


def _expected(pattern: str) -> set[str]:
    """Where the wheel must have every file of the source tree that matches `pattern`."""
    return {
        f"{place}/{file.relative_to(ROOT / folder)}"
        for folder, place in _PLACES.items()
        for file in (ROOT / folder).rglob(pattern)
    }


@pytest.mark.parametrize("pattern", ["*.py", "*.yaml", "*.json", "py.typed"])
def test_wheel_holds_every_module_recipe_configuration_and_protocol(
    wheel: zipfile.ZipFile, pattern: str
) -> None:
    expected = _expected(pattern)
    assert expected, f"the source tree has no {pattern}"
    missing = expected - set(wheel.namelist())
    assert not missing, f"add {', '.join(sorted(missing))} to packages or package-data in pyproject.toml"


def test_wheel_holds_nothing_but_the_packages_and_its_metadata(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"dynrank_ds", "dynrank_eval"}


def test_wheel_names_license_authors_and_both_commands(wheel: zipfile.ZipFile) -> None:
    texts = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(texts["METADATA"]).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The dynrank_ds authors"
    assert {"LICENSE", "NOTICE"} <= set(metadata.get_all("License-File") or [])
    commands = wheel.read(texts["entry_points.txt"]).decode()
    assert "dynrank = dynrank_ds.cli:main" in commands and "dynrank-eval = dynrank_eval.cli:main" in commands
