"""Every command that writes a folder, on every kind of folder that may be there already."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from dynrank_ds.cli import main
from dynrank_ds.export import export_adapter, export_checkpoint, merge_adapter

from .conftest import draw_modules, save_base, save_checkpoint


@dataclass
class Place:
    """A run, another run, their bases and adapters, and the folder that a command is to write."""

    root: Path

    @property
    def output(self) -> Path:
        return self.root / "output"

    def export(self, output: Path, run: str = "run", format: str = "peft") -> None:
        export_adapter(self.root / run, output, format)  # type: ignore[arg-type]

    def merge(self, output: Path, run: str = "run", base: str = "base") -> None:
        adapter = self.root / f"adapter-of-{run}"
        if not adapter.exists():
            self.export(adapter, run)
        merge_adapter(adapter, str(self.root / base), output)

    def command(self, name: str, output: Path) -> int:
        """The command line that would write `output`; its exit code."""
        if name == "merge":
            if not (self.root / "adapter-of-run").exists():
                self.export(self.root / "adapter-of-run")
            sources = ["--adapter", str(self.root / "adapter-of-run"), "--base", str(self.root / "base")]
        else:
            sources = ["--run", str(self.root / "run"), "--format", name]
        return main(["merge" if name == "merge" else "export", *sources, "--output", str(output)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for base in ("base", "other-base"):
        save_base(root / base, num_hidden_layers=1)
    model = LlamaForCausalLM.from_pretrained(root / "base")
    modules = draw_modules(model, {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 1})
    for run in ("run", "other-run"):
        for checkpoint in ("best-3", "step-4"):
            save_checkpoint(root / run / "checkpoints" / checkpoint, root / "base", modules)
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    shutil.copytree(made, tmp_path / "place")
    return Place(tmp_path / "place")


def mine(place: Place) -> None:
    place.output.mkdir()
    (place.output / "notes.txt").write_text("mine")


def with_a_file_of_mine(place: Place) -> None:
    place.export(place.output)
    (place.output / "notes.txt").write_text("mine")


def changed_by_me(place: Place) -> None:
    place.merge(place.output)
    save_file({"x": torch.ones(2)}, place.output / "model.safetensors")


def damaged(place: Place) -> None:
    place.export(place.output)
    (place.output / "dynrank.json").write_text("{")


def not_an_object(place: Place) -> None:
    place.export(place.output)
    (place.output / "dynrank.json").write_text("[]")


def a_file(place: Place) -> None:
    place.output.write_text("mine")


def link_to_my_folder(place: Place) -> None:
    (place.root / "mine").mkdir()
    (place.root / "mine/notes.txt").write_text("mine")
    place.output.symlink_to("mine")


def leftover_name_of_mine(place: Place) -> None:
    (place.root / ".output.tmp").mkdir()
    (place.root / ".output.tmp/notes.txt").write_text("mine")


# What is there -> the commands that may replace it
KINDS: dict[str, tuple[Callable[[Place], None], set[str]]] = {
    "nothing": (lambda place: None, {"peft", "padded", "merge"}),
    "an empty folder": (lambda place: place.output.mkdir(), {"peft", "padded", "merge"}),
    "an earlier export": (lambda place: place.export(place.output), {"peft"}),
    "an earlier padded export": (lambda place: place.export(place.output, format="padded"), {"padded"}),
    "an earlier merge": (lambda place: place.merge(place.output), {"merge"}),
    "an export of another run": (lambda place: place.export(place.output, "other-run"), set()),
    "an export of the best checkpoint": (
        lambda place: export_checkpoint(place.root / "run/checkpoints/best-3", place.output),
        set(),
    ),
    "a merge of another adapter": (lambda place: place.merge(place.output, "other-run"), set()),
    "a merge into another base": (lambda place: place.merge(place.output, base="other-base"), set()),
    "a run": (lambda place: shutil.copytree(place.root / "run", place.output) and None, set()),
    "my own folder": (mine, set()),
    "an export with a file of mine": (with_a_file_of_mine, set()),
    "a merged model that I changed": (changed_by_me, set()),
    "an export with a damaged record": (damaged, set()),
    "a record that is no object": (not_an_object, set()),
    "a file": (a_file, set()),
    "a link to my own folder": (link_to_my_folder, set()),
    "my folder under the temporary name": (leftover_name_of_mine, set()),
}


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["peft", "padded", "merge"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_replaced_only_where_the_same_command_made_it_of_the_same(
    kind: str, command: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make, replaceable = KINDS[kind]
    place.export(place.root / "adapter-of-run")
    make(place)
    before = content(place.root)
    capsys.readouterr()
    code = place.command(command, place.output)
    if command in replaceable:
        assert code == 0, capsys.readouterr().err
        assert (place.output / "dynrank.json").is_file()
        assert not [path for path in place.root.iterdir() if path.name.startswith(".")]
        assert not list(place.output.glob(".*"))
    else:
        assert code == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert content(place.root) == before


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("merge", "adapter-of-run"),
        ("merge", "base"),
        ("peft", "run"),
        ("peft", "run/checkpoints"),
        ("padded", "run/checkpoints/step-4"),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_an_input_is_never_the_output(
    command: str, output: str, link: bool, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.export(place.root / "adapter-of-run")
    before = content(place.root)
    target = place.root / output
    if link:
        (place.root / "link").symlink_to(target)
        target = place.root / "link"
    assert place.command(command, target) == 2
    assert "is one that is read from" in capsys.readouterr().err
    assert content(place.root) == before


def test_a_merged_model_is_not_replaced_by_a_merge_that_reads_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into itself, and into a folder whose weights are links to it."""
    place.merge(place.output)
    before = content(place.output)
    adapter = place.root / "adapter-of-run"
    merge = ["merge", "--adapter", str(adapter), "--output", str(place.output), "--base"]
    assert main([*merge, str(place.output)]) == 2
    linked = place.root / "linked"
    linked.mkdir()
    for name in os.listdir(place.output):
        (linked / name).symlink_to(place.output / name)
    assert main([*merge, str(linked)]) == 2
    assert capsys.readouterr().err.count("is one that is read from") == 2
    assert content(place.output) == before


def test_what_a_killed_command_left_is_cleared_away(place: Place) -> None:
    place.export(place.output)
    left = place.root / ".output.tmp"
    shutil.copytree(place.output, left)
    (left / ".dynrank-unfinished").touch()
    (place.output / ".dynrank-unfinished").touch()
    assert place.command("peft", place.output) == 0
    assert not left.exists() and not (place.output / ".dynrank-unfinished").exists()


def test_an_adapter_that_an_earlier_version_wrote_is_replaced_by_its_own_run(place: Place) -> None:
    """Its record lists the names of the files, and no format: a finished run that is resumed writes it again."""
    place.export(place.output)
    record = json.loads((place.output / "dynrank.json").read_text())
    record = {key: value for key, value in record.items() if key != "format"}
    (place.output / "dynrank.json").write_text(
        json.dumps(record | {"files": ["dynrank.json", *record["files"]]})
    )
    assert place.command("padded", place.output) == 2
    assert place.command("peft", place.output) == 0
