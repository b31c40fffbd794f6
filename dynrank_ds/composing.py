"""Recipe files as plain mappings: found by name or path, composed of their bases, changed by overrides.

A recipe may start from others with `base: NAME_OR_PATH` or `base: [NAME_OR_PATH, ...]` (paths from its own folder); a
later one wins over an earlier one, and the recipe's own keys over all. `A+B+C` as a name is the same list. What a file
says under `with: {NAME: sections}` counts only where NAME is composed too: numbers that belong to a pair, such as the
learning rate of a model on one data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynrank_ds.documents import DuplicateKeyError, parse_yaml
from dynrank_ds.errors import RecipeError

if TYPE_CHECKING:
    from importlib.abc import Traversable

FRAGMENTS = ("models", "quantisation", "data", "methods")
"""Folders of the shipped parts of recipes."""
JOIN = "+"


def read_recipe(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the sections of a recipe by name, by path, or composed as A+B+C, with `section.key=value` overrides.

    What has no output.dir goes to runs/NAME, a composition to runs/A_B_C.

    Raises:
        RecipeError: a file is not there, is no mapping in YAML, or is its own base; an override is malformed.
    """
    names = [name] if Path(name).is_file() else name.split(JOIN)
    values = _composed(names, None, frozenset(), ())
    directory = "runs/" + "_".join(Path(part).stem for part in names)
    return _overridden(merged({"output": {"dir": directory}}, values), overrides)


def shipped(folder: str = "") -> list[str]:
    """Names of the recipes that come with the package, or of the parts in one of FRAGMENTS."""
    files = resources.files("dynrank_ds.recipes").joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` updated by `above`, section by section; a method of another name replaces the whole section."""
    result = dict(below)
    for key, value in above.items():
        old = below.get(key)
        same_kind = (
            isinstance(old, dict)
            and isinstance(value, dict)
            and value.get("name", old.get("name")) == old.get("name")
        )
        result[key] = {**old, **value} if same_kind else value  # type: ignore[dict-item]
    return result


def _composed(
    names: Sequence[str], folder: Path | None, beside: frozenset[str], seen: tuple[str, ...]
) -> dict[str, Any]:
    """Return the sections of `names`, later over earlier; `beside` are the names that they are composed with."""
    beside |= {Path(name).stem for name in names}
    values: dict[str, Any] = {}
    for name in names:
        part = _read(name, folder, beside, seen)
        pairs = part.pop("with", {})
        values = merged(values, part)
        for other in pairs:
            if other in beside:
                values = merged(values, pairs[other])
    return values


def _read(name: str, folder: Path | None, beside: frozenset[str], seen: tuple[str, ...]) -> dict[str, Any]:
    """Return the sections of one file over those of its bases, and what it has under `with`."""
    file = _find(name, folder)
    name = str(file) if isinstance(file, Path) and Path(name).suffix else name
    if name in seen:
        raise RecipeError(f"{name}: its bases form a circle: {' -> '.join((*seen, name))}")
    values = read_mapping(file, name)
    base = values.pop("base", [])
    names = base if isinstance(base, list) else [base]
    if not all(isinstance(one, str) for one in names):
        raise RecipeError(f"{name}: base is {base!r}: give the name or path of a recipe, or a list of them")
    pairs = values.get("with", {})
    if not isinstance(pairs, dict) or not all(isinstance(sections, dict) for sections in pairs.values()):
        raise RecipeError(
            f"{name}: with is {pairs!r}: give sections for each name, with: {{NAME: {{train: ...}}}}"
        )
    own_folder = file.parent if isinstance(file, Path) else None
    names = [os.path.expanduser(os.path.expandvars(one)) for one in names]
    return merged(_composed(names, own_folder, beside, (*seen, name)), values)


def read_mapping(file: Traversable, name: str) -> dict[str, Any]:
    """Return the sections of a YAML file, which messages call `name`.

    Raises:
        RecipeError: it is no YAML, holds a key twice, or no sections.
    """
    try:
        values = parse_yaml(file.read_text())
    except DuplicateKeyError as error:
        raise RecipeError(f"{name}: {error}: remove one of the two") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{name} holds {type(values).__name__}, not sections such as model: and train:")
    return values


def _find(name: str, folder: Path | None) -> Traversable:
    for file in _places(name, folder):
        if file.is_file():
            return file
    parts = "; ".join(f"{kind}: {', '.join(shipped(kind))}" for kind in FRAGMENTS)
    raise RecipeError(
        f"recipe '{name}' is neither a file nor one of {', '.join(shipped())}; nor a part of one ({parts})"
    )


def _places(name: str, folder: Path | None) -> Iterator[Traversable]:
    """Where a name may lie: beside the file that names it, in the working directory, in the package."""
    if folder is not None:
        yield folder / name
    yield Path(name)
    root = resources.files("dynrank_ds.recipes")
    yield root.joinpath(f"{name}.yaml")
    for kind in FRAGMENTS:
        yield root.joinpath(kind).joinpath(f"{name}.yaml")


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, field = key.partition(".")
        if not (equals and dot and field):
            raise RecipeError(f"override '{override}' is not of the form section.key=value")
        try:
            value = parse_yaml(text)
        except DuplicateKeyError as error:
            raise RecipeError(f"override '{override}': {error}: remove one of the two") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"override '{override}': the value is not valid YAML") from error
        if isinstance(value, dict) and None in value.values():
            raise RecipeError(
                f"override '{override}': a key has no value: YAML takes a space after the colon, {{lang: python}}"
            )
        if isinstance(value, str):
            value = _number(value)
        values = merged(values, {section: {field: value}})
    return values


def _number(text: str) -> str | float:
    """Return the number in texts such as 2e-3, which YAML 1.1 does not read as a number."""
    try:
        return float(text)
    except ValueError:
        return text
