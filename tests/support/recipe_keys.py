"""recipes/README.md, generated from the schema of recipes.

python -m tests.support.recipe_keys > recipes/README.md
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from dynrank_ds.composing import FRAGMENTS, shipped
from dynrank_ds.methods import METHODS
from dynrank_ds.recipe import Recipe, load_recipe

_HEAD = """\
# Recipes

A recipe is one YAML file with the sections below. Every key can be overridden on the command line as
`section.key=value`, where the value is YAML. Unknown keys are refused. `dynrank validate --recipe FILE` checks a recipe
with its model and data, without a GPU.

`base: NAME_OR_FILE` starts from another recipe, `base: [MODEL, DATA, METHOD]` from several, of which a later one wins
over an earlier one; the recipe's own keys win over all. `--recipe MODEL+DATA+METHOD` is the same without a file, and
writes to `runs/MODEL_DATA_METHOD`: with the [parts](#parts) below

```bash
dynrank prepare --recipe llama3_8b+codefeedback_python+elalora
deepspeed --num_gpus 8 launcher/train.py --recipe llama3_8b+codefeedback_python+elalora train.seed=1
```

What a file says under `with: {NAME: ...}` counts only where NAME is composed too, such as LLaMA-3-8B's learning rate on
CodeFeedback.

This file is generated from the schema: `python -m tests.support.recipe_keys > recipes/README.md`.
"""
_METHOD = """\
## method

`name` chooses the method, and with it the other keys. [What each does](../dynrank_ds/methods/README.md). The times
`t_i`, `interval`, `t_f` and `disconnect_at` are whole steps, or a share of training below 1. A triple is a row of A, an
entry of e and a row of B: [glossary](../dynrank_ds/README.md).
"""
_PARTS = """\
## Parts

| of | names |
|---|---|
"""
_SHIPPED = """\
## Shipped recipes

`bash launcher/quickstart.sh` makes the model and data of those that begin with `quickstart`, where the recipes name
them; `dynrank prepare --recipe NAME` fetches those of the others.

| name | method | steps or epochs | global batch | learning rate |
|---|---|---|---|---|
"""
_BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}


def page() -> str:
    """The whole file."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items() if name != "method"}
    parts = [_HEAD]
    parts += [_table(f"## {name}", section) for name, section in sections.items()]
    parts.append(_METHOD)
    parts += [_table(f"### {name}", method.config_class, skipped="name") for name, method in METHODS.items()]
    names = {kind: ", ".join(f"`{name}`" for name in shipped(kind)) for kind in FRAGMENTS}
    parts.append(_PARTS + "".join(f"| {kind} | {found} |\n" for kind, found in names.items()))
    rows = [_shipped(name) for name in shipped()]
    return "\n".join([*parts, _SHIPPED + "".join(rows)])


def _shipped(name: str) -> str:
    recipe = load_recipe(name)
    train = recipe.train
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    return (
        f"| `{name}` | {recipe.method.name} | {length} | {train.global_batch_size} | {train.peak_rate:g} |\n"
    )


def _table(title: str, section: Any, skipped: str = "") -> str:
    rows = [row for key, row in _rows(section) if key != skipped]
    if not rows:
        return f"{title}\n\nNo other keys.\n"
    return "\n".join([f"{title}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _rows(section: type[BaseModel]) -> Iterator[tuple[str, str]]:
    schema = section.model_json_schema()
    texts = key_docstrings(section)
    for key, value in schema["properties"].items():
        required = key in schema.get("required", ())
        preset = section.model_fields[key].get_default(call_default_factory=True)
        default = "required" if required else f"`{json.dumps(preset, ensure_ascii=False)}`"
        text = texts.get(key) or value.get("description", "")
        cells = (f"`{key}`", _type(value), default, text)
        yield key, "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def key_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a section and its bases, on one line."""
    texts: dict[str, str] = {}
    for cls in reversed([c for c in section.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return texts


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_type(one) for one in schema[union])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any value")
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_type(one) for one in schema['prefixItems'])}]"
        return f"list of {_type(schema['items'])}"
    if kind == "object":
        return f"mapping to {_type(schema.get('additionalProperties', {}))}"
    bounds = [text.format(f"{schema[name]:g}") for name, text in _BOUNDS.items() if name in schema]
    return " ".join([str(kind), *bounds])


if __name__ == "__main__":
    print(page(), end="")
