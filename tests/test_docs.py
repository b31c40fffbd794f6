"""The documents do not go stale: their commands run or parse, their recipes load, their links lead somewhere.

Commands that a CPU runs in seconds are run, in a folder with a tiny model, data and a finished run under the names that
the documents use. Of the others the arguments are parsed, and recipes are loaded with the overrides. The quickstart and
the test suite are run by .ci/run; here their scripts must exist and be valid.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed.run
import yaml

import dynrank_ds.cli
import dynrank_eval.cli
from dynrank_ds.composing import JOIN, shipped
from dynrank_ds.errors import RecipeError
from dynrank_ds.recipe import load_recipe
from dynrank_ds.study.definition import load_study
from tests.support.launch import launcher_script, train
from tests.support.recipe_keys import page
from tests.support.recipes import write_recipe
from tests.support.tiny import write_data

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", ".github/*.md", "*/README.md", "dynrank_ds/*/README.md", "launcher/*/README.md")
    for path in ROOT.glob(pattern)
)
_PROGRAMS = "dynrank|dynrank-eval|python|bash|deepspeed|torchrun|pytest|pip|pre-commit"
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(rf"`((?:[A-Z_]+=\S+ )*(?:{_PROGRAMS}) [^`]*)`")
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def blocks(document: str, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall((ROOT / document).read_text()) if kind == language]


def block_commands(document: str) -> Iterator[str]:
    """Every command of its bash blocks, without comments."""
    for body in blocks(document, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", re.sub(r"(^| )#.*", "", line)):
                if part.strip():
                    yield part.strip()


def named_commands(document: str) -> Iterator[str]:
    """Every command that its text names, but for those that are cut short by "..."."""
    prose = re.sub(r"\s*\n\s*", " ", _BLOCK.sub("", (ROOT / document).read_text()))
    yield from (command for command in _INLINE.findall(prose) if "..." not in command)


def help_examples() -> list[str]:
    """The example of every command of `dynrank` and `dynrank-eval`."""
    found = []
    for parser in (dynrank_ds.cli._parser(), dynrank_eval.cli._parser()):
        (subparsers,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for one in (parser, *subparsers.choices.values()):
            assert one.epilog, one.prog
            examples = one.epilog.split("example:", 1)[1].split(";")
            found += [text.strip() for text in examples if re.match(r"\s*dynrank(?! COMMAND)", text)]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the documents name: a recipe R and my.yaml, its model and data, a finished run RUN."""
    folder = tmp_path_factory.mktemp("docs")
    recipe = yaml.safe_load(write_recipe(folder).read_text())
    recipe["output"]["dir"] = str(folder / "RUN")
    for name in ("my.yaml", "R", "FILE"):
        (folder / name).write_text(yaml.safe_dump(recipe))
    train(1, folder / "my.yaml")
    shutil.copytree(folder / "RUN", folder / "runs/quickstart/run")
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy for one test: commands write into it."""
    return shutil.copytree(finished, tmp_path / "workspace")


def is_named_only(command: str) -> bool:
    """Return whether a text names one of our commands, with existing options alone, to speak of it."""
    program, *words = shlex.split(command)
    parsers = {"dynrank": dynrank_ds.cli._parser, "dynrank-eval": dynrank_eval.cli._parser}
    if program not in parsers or any(not word.startswith("--") for word in words[1:]):
        return False
    parser = parsers[program]()
    (subparsers,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert words[0] in subparsers.choices, words
    return {word.split("=")[0] for word in words[1:]} <= set(
        subparsers.choices[words[0]]._option_string_actions
    )


def run_dynrank(words: list[str], workspace: Path) -> None:
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else ""
    if words[0] == "plan" or JOIN in recipe:  # tests/planning runs the documented plans
        _check_recipe(recipe, [w for w in words[1:] if "=" in w])
        dynrank_ds.cli._parser().parse_args(words)
    elif words[-1] == "quickstart" or "quickstart" in words or "NAME" in words:
        _check_recipe("quickstart", [w for w in words[1:] if "=" in w])
        dynrank_ds.cli._parser().parse_args(words)
    elif words[0] == "suggest-ranks":  # it forms a process group, which this process must not be in
        subprocess.run([sys.executable, "-m", "dynrank_ds.cli", *words], check=True, cwd=workspace)
    else:
        assert dynrank_ds.cli.main(words) == 0


def run_dynrank_eval(words: list[str], workspace: Path) -> None:
    dynrank_eval.cli._parser().parse_args(words)


def run_deepspeed(words: list[str], workspace: Path) -> None:
    after = words[words.index("launcher/train.py") + 1 :]
    assert after[0] == "--recipe"
    _check_recipe(after[1], [word for word in after[2:] if not word.startswith("resume=")])


def run_torchrun(words: list[str], workspace: Path) -> None:
    """R stands for the number of a node."""
    script = words.index("launcher/train.py") if "launcher/train.py" in words else len(words)
    options = ["0" if word == "R" else word for word in words[:script]]
    if script < len(words):
        torch.distributed.run.get_args_parser().parse_args([*options, "launcher/train.py"])
        run_deepspeed(words[script:], workspace)
    else:
        known = torch.distributed.run.get_args_parser().format_help()
        assert all(word.split("=")[0] in known for word in options if word.startswith("--")), words


def _check_recipe(name: str, overrides: list[str]) -> None:
    load_recipe(name, overrides)


def run_python(words: list[str], workspace: Path) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        if words[0] == "launcher/train.py":
            run_deepspeed(words, workspace)
        if words[0] == "launcher/slurm/submit.py":
            given = launcher_script("slurm/submit.py")._parser().parse_intermixed_args(words[1:])
            _check_recipe(given.recipe, given.overrides)
        if words[0] == "launcher/sweep.py":
            load_study(ROOT / launcher_script("sweep.py")._parser().parse_args(words[1:]).study)
        return
    assert importlib.util.find_spec(words[1]) is not None
    if words[1] == "dynrank_ds.bench" and len(words) > 2:
        from dynrank_ds.bench.cli import BENCHMARKS

        assert words[2] in BENCHMARKS
    if words[1] == "pytest":
        run_pytest(words[2:], workspace)


def run_bash(words: list[str], workspace: Path) -> None:
    script = ROOT / words[0]
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert all(word in text for word in words[1:] if word.startswith("--"))


def run_pytest(words: list[str], workspace: Path) -> None:
    for word in words:
        if not word.startswith("-") and "/" in word:
            assert (ROOT / word.split("::")[0]).exists(), word
            assert all(
                f"def {name}" in (ROOT / word.split("::")[0]).read_text() for name in word.split("::")[1:]
            )


def run_pip(words: list[str], workspace: Path) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known)


def run_pre_commit(words: list[str], workspace: Path) -> None:
    assert (ROOT / ".pre-commit-config.yaml").is_file()


def run_sbatch(words: list[str], workspace: Path) -> None:
    run_as_documented(words[words.index("--wrap") + 1], workspace)


def run_source(words: list[str], workspace: Path) -> None:
    assert words == [".venv/bin/activate"]


RULES: dict[str, Callable[[list[str], Path], None]] = {
    "dynrank": run_dynrank,
    "dynrank-eval": run_dynrank_eval,
    "deepspeed": run_deepspeed,
    "torchrun": run_torchrun,
    "python": run_python,
    "bash": run_bash,
    "pytest": run_pytest,
    "pip": run_pip,
    "pre-commit": run_pre_commit,
    "sbatch": run_sbatch,
    "source": run_source,
}


def run_as_documented(command: str, workspace: Path) -> None:
    words = shlex.split(command.split(" > ")[0])
    while "=" in words[0]:
        words.pop(0)
    assert words[0] in RULES, f"no rule says how to check '{command}'"
    RULES[words[0]](words[1:], workspace)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_run_or_parse(
    document: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    named = (command for command in named_commands(document) if not is_named_only(command))
    for command in (*block_commands(document), *named):
        print(command)
        run_as_documented(command, workspace)


def test_examples_of_the_help_run_or_parse(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    examples = help_examples()
    assert len(examples) > 10
    for example in examples:
        print(example)
        run_as_documented(example, workspace)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_recipes_of_a_document_load(document: str, workspace: Path, tmp_path: Path) -> None:
    for body in blocks(document, "yaml"):
        values = yaml.safe_load(body)
        base = {} if {"model", "data"} <= set(values) else {"base": str(workspace / "my.yaml")}
        file = tmp_path / "documented.yaml"
        file.write_text(yaml.safe_dump({**base, **values}))
        load_recipe(str(file))


def test_the_readmes_recipe_validates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe,) = blocks("README.md", "yaml")
    assert len(recipe.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(recipe)
    write_data(Path("train.jsonl"), samples=400)
    assert dynrank_ds.cli.main(["validate", "--recipe", "my.yaml", f"model.path={workspace / 'model'}"]) == 0
    assert "pe_dyra: " in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_lead_to_files(document: str) -> None:
    for target in _LINK.findall((ROOT / document).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


def messages_of_the_code() -> str:
    """Every text of the packages and scripts; what an f-string fills in is left out."""
    texts = []
    for folder in ("dynrank_ds", "eval", "launcher"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                    texts.append("\0".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    others = {"torch.OutOfMemoryError", "LoRA rank ... is greater than max_lora_rank"}
    text = (ROOT / ".github/TROUBLESHOOTING.md").read_text()
    quoted = {
        one for row in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE) for one in re.findall("`(.+?)`", row)
    }
    assert len(quoted) > 40
    known = messages_of_the_code()
    assert {one for one in quoted if one not in known} == others


def test_keys_of_recipes_are_documented_as_the_schema_has_them() -> None:
    stored = (ROOT / "recipes/README.md").read_text()
    assert page() == stored, "run: python -m tests.support.recipe_keys > recipes/README.md"


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("quickstart")])
def test_a_quickstart_recipe_without_model_names_the_command_that_makes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dynrank_ds.cli.main(["validate", "--recipe", name]) == 2
    assert "`bash launcher/quickstart.sh` makes" in capsys.readouterr().err


def test_quickstart_recipes_name_what_the_quickstart_makes() -> None:
    script = (ROOT / "launcher/quickstart.sh").read_text()
    assert "model=$DYNRANK_ROOT/.cache/smollm2-135m-instruct\n" in script
    assert "output=${output:-$DYNRANK_ROOT/runs/quickstart" in script and "data=$output/data\n" in script
    for name in shipped():
        recipe = load_recipe(name)
        if name.startswith("quickstart"):
            assert recipe.model.path == ".cache/smollm2-135m-instruct"
            assert recipe.data.source == "runs/quickstart/data/train.jsonl"


def test_a_documented_mistake_is_found(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail."""
    monkeypatch.chdir(workspace)
    with pytest.raises(RecipeError):
        run_as_documented("deepspeed launcher/train.py --recipe my.yaml train.learning_rat=1", workspace)
    with pytest.raises(AssertionError):
        run_as_documented("dynrank export --run MISSING --output there", workspace)
    with pytest.raises(SystemExit):
        run_as_documented("dynrank-eval run --modle x --task gsm8k --output y", workspace)
    with pytest.raises(AssertionError):
        run_as_documented("bash launcher/quickstart.sh --shrot", workspace)
    with pytest.raises(AssertionError):
        run_as_documented("make all", workspace)
