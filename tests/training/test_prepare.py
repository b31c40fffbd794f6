"""What `dynrank prepare` leaves is enough without the hub, and nothing is tokenised twice."""

from __future__ import annotations

import fcntl
import json
import logging
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dynrank_ds.cli import main
from dynrank_ds.data import store
from dynrank_ds.errors import DataError, MachineError, ModelError
from dynrank_ds.recipe import Recipe, check_recipe
from dynrank_ds.training import samples as samples_module
from dynrank_ds.training.model import fetch_model
from dynrank_ds.training.samples import prepare_data
from tests.support.tiny import write_data, write_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and data, and an empty cache."""
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl", samples=12, longest=20)
    monkeypatch.setenv("DYNRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path


def recipe(folder: Path, **data: Any) -> Recipe:
    values = {
        "model": {"path": str(folder / "model")},
        "data": {"source": str(folder / "data.jsonl"), "max_length": 200, **data},
        "method": {"name": "lora"},
        "train": {"steps": 20, "global_batch_size": 4, "learning_rate": 1e-3},
        "output": {"dir": str(folder / "run")},
    }
    return check_recipe(values, "recipe")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The entries that were tokenised."""
    entries: list[Path] = []
    real = store.write

    def noting(entry: Path, *arguments: Any) -> None:
        entries.append(entry)
        real(entry, *arguments)

    monkeypatch.setattr(samples_module.store, "write", noting)
    return entries


def test_data_is_tokenised_once_whatever_its_file_is_called(folder: Path, written: list[Path]) -> None:
    first, _ = prepare_data(recipe(folder))
    (folder / "data.jsonl").rename(folder / "moved.jsonl")
    again, _ = prepare_data(recipe(folder, source=str(folder / "moved.jsonl"), max_dropped=0.5))
    assert len(written) == 1 and np.array_equal(first.tokens, again.tokens)
    assert isinstance(again.tokens, np.memmap) and isinstance(again.targets, np.memmap)


@pytest.mark.parametrize(
    "change",
    [{"limit": 5}, {"max_length": 100}, {"format": "alpaca", "max_dropped": 1.0}, {"filter": {"query": "x"}}],
)
def test_whatever_changes_the_tokens_makes_an_entry_of_its_own(
    folder: Path, written: list[Path], change: dict[str, Any]
) -> None:
    prepare_data(recipe(folder))
    try:
        prepare_data(recipe(folder, **change))
    except DataError:
        assert change.keys() & {"format", "filter"}
    assert len(set(written)) == 2


def test_changed_rows_and_changed_tokenizers_are_tokenised_again(folder: Path, written: list[Path]) -> None:
    prepare_data(recipe(folder))
    with (folder / "data.jsonl").open("a") as file:
        file.write(json.dumps({"query": "w1", "response": "w2"}) + "\n")
    assert len(prepare_data(recipe(folder))[0]) == 13
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder / "model")
    prepare_data(recipe(folder))
    assert len(set(written)) == 3


def test_processes_that_start_together_tokenise_once(folder: Path, written: list[Path]) -> None:
    sizes: list[int] = []
    threads = [
        threading.Thread(target=lambda: sizes.append(len(prepare_data(recipe(folder))[0]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [12] * 4 and len(written) == 1


def test_an_interrupted_entry_is_written_again_and_a_damaged_one_is_named(
    folder: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_write_arrays", _interrupted)
        prepare_data(recipe(folder))
    assert not written[0].exists()
    prepare_data(recipe(folder))
    tokens = written[0] / "tokens"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(
        DataError, match=r"the tokenised data is damaged \(tokens has \d+ bytes, not \d+\), delete"
    ):
        prepare_data(recipe(folder))


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_cache_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("DYNRANK_CACHE", str(folder / "file"))
    with pytest.raises(
        MachineError, match=r"the cache folder .*file/tokenised cannot be written .*set DYNRANK_CACHE"
    ):
        prepare_data(recipe(folder))


def test_a_process_that_hangs_while_it_tokenises_is_not_waited_for_for_ever(
    folder: Path, written: list[Path]
) -> None:
    prepare_data(recipe(folder))
    [entry] = written
    (entry / "about.json").unlink()
    chosen = recipe(folder)
    chosen = chosen.model_copy(update={"deepspeed": chosen.deepspeed.model_copy(update={"timeout": 0.2})})
    with Path(f"{entry}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(MachineError, match=r"tokenising into .* nothing for 0\.2 s.*dynrank prepare"):
            prepare_data(chosen)


def test_a_process_that_tokenises_for_long_is_waited_for(folder: Path, written: list[Path]) -> None:
    prepare_data(recipe(folder))
    [entry] = written
    shutil.rmtree(entry)
    chosen = recipe(folder)
    chosen = chosen.model_copy(update={"deepspeed": chosen.deepspeed.model_copy(update={"timeout": 0.3})})
    unfinished = Path(f"{entry}.tmp")
    unfinished.mkdir()
    with Path(f"{entry}.lock").open("w") as held, (unfinished / "tokens").open("wb", buffering=0) as tokens:
        fcntl.flock(held, fcntl.LOCK_EX)

        def tokenise() -> None:
            for _ in range(30):
                tokens.write(b"0")
                time.sleep(0.05)
            fcntl.flock(held, fcntl.LOCK_UN)

        thread = threading.Thread(target=tokenise)
        thread.start()
        assert len(prepare_data(chosen)[0]) == 12
        thread.join()


def test_a_full_disk_of_the_cache_is_reported_and_leaves_nothing(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(MachineError, match=r"the cache folder .*: File too large; make room"):
            prepare_data(recipe(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in (folder / "cache" / "tokenised").iterdir()] == [".lock"]
    assert len(prepare_data(recipe(folder))[0]) == 12


def test_a_finished_entry_needs_no_cache_that_can_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute nodes may see it read-only: not even a lock is taken."""
    prepare_data(recipe(folder))
    monkeypatch.setattr(store, "FileLock", lambda _: pytest.fail("a lock was asked for"))
    assert len(prepare_data(recipe(folder))[0]) == 12


def test_dropped_rows_are_reported_each_time_with_their_number_and_the_first_of_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"query": "w1", "response": ""}\n{"query": "w1", "response": 7}\n')
    for _ in ("tokenised", "from the cache"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(prepare_data(recipe(folder, max_dropped=0.2))[0]) == 12
        assert caplog.messages == [
            f"2 of 14 rows cannot be trained on (1: {folder}/data.jsonl, line 13: field 'response' is empty, it must "
            f"be text; 1: {folder}/data.jsonl, line 14: field 'response' is 7 (int), it must be text) and were dropped"
        ]
    with pytest.raises(
        DataError, match=r"2 of 14 rows .* at most 1.0% may be: mend them, or raise data.max_dropped"
    ):
        prepare_data(recipe(folder))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], **data: Any) -> str:
    """What `dynrank prepare` says of a recipe that it must refuse."""
    (folder / "r.yaml").write_text(json.dumps(recipe(folder, **data).model_dump(mode="json")))
    assert main(["prepare", "--recipe", str(folder / "r.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_prepare_refuses_what_a_run_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.jsonl: no such file or folder" in refused(folder, capsys, source="nowhere.jsonl")
    assert "data.held_out is 12, 12 of 12 samples" in refused(folder, capsys, held_out=12)
    (folder / "data.jsonl").write_text('{"query": "w1", "response": "w2"}\n{"query": "w1"')
    assert f"{folder}/data.jsonl, line 2: not valid JSON" in refused(folder, capsys)
    (folder / "data.jsonl").write_text('{"question": "w1", "response": "w2"}\n')
    assert "line 1: field 'query' is missing (fields there: question, response)" in refused(folder, capsys)
    (folder / "data.jsonl").write_text("")
    assert "the data set is empty, at least one row is needed" in refused(folder, capsys)
    assert "at least one row that passes data.filter" in refused(folder, capsys, filter={"lang": "python"})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_out_of_reach_ends_prepare_in_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refused(folder, capsys, source="owner/name", streaming=streaming)
    assert "owner/name: split 'train' cannot be loaded by datasets, after row 0 (Couldn't reach" in message


def test_after_prepare_the_hub_is_not_asked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    real = datasets.load_dataset
    hub = folder / "hub"
    hub.mkdir()
    (folder / "data.jsonl").rename(hub / "train.jsonl")
    (folder / "r.yaml").write_text(
        json.dumps(recipe(folder, source="owner/name", limit=8).model_dump(mode="json"))
    )
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "hf"))
        patch.setattr(datasets, "load_dataset", lambda _, revision, **choices: real(str(hub), **choices))
        assert main(["prepare", "--recipe", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert "8 samples" in out and str(folder / "model") in out and str(folder / "cache") in out
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    assert main(["validate", "--recipe", "r.yaml"]) == 0
    assert "8 samples" in capsys.readouterr().out


def test_streamed_data_are_the_same_samples_in_the_same_order(
    folder: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    real, asked = datasets.load_dataset, []

    def noting(source: str, streaming: bool, **choices: Any) -> Any:
        asked.append(streaming)
        return real(source, streaming=streaming, **choices)

    monkeypatch.setattr(datasets, "load_dataset", noting)
    (folder / "set" / "train").mkdir(parents=True)
    (folder / "set" / "train" / "rows.csv").write_text(
        "query,response\n" + "".join(f"w{i},w{i} w1\n" for i in range(9))
    )
    stored, streamed = (
        prepare_data(recipe(folder, source=str(folder / "set"), streaming=streaming, limit=limit))[0]
        for streaming, limit in ((False, None), (True, 8))
    )
    assert asked == [False, True] and len(written) == 2 and len(stored) == 9
    assert np.array_equal(stored.tokens[: len(streamed.tokens)], streamed.tokens)
    assert np.array_equal(stored.lengths[:8], streamed.lengths)


def test_a_model_that_the_hub_does_not_give_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"nobody/nothing: its config.json cannot be fetched from the hub: "):
        fetch_model("nobody/nothing")


def test_columns_give_fields_other_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_named, _ = prepare_data(recipe(folder))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    renamed = [{"q": row["query"], "query": "not this", "a": row["response"]} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    columns = {"query": "q", "response": "a"}
    mapped, _ = prepare_data(recipe(folder, columns=columns, filter={"q": [row["query"] for row in rows]}))
    assert np.array_equal(as_named.tokens, mapped.tokens) and np.array_equal(as_named.targets, mapped.targets)
    assert "data.columns maps 'question', but data.format metamathqa reads query, response" in refused(
        folder, capsys, columns={"question": "q"}
    )
    assert "field 'response' is missing" in refused(folder, capsys, columns={"query": "q", "response": "z"})


def test_long_rows_are_cut_where_asked_for_and_their_number_is_reported(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = prepare_data(recipe(folder))
    shortest, longest = int(whole.lengths.min()), int(whole.lengths.max())
    assert shortest < longest - 3
    cut, _ = prepare_data(recipe(folder, max_length=longest - 3, overflow="truncate"))
    assert len(cut) == len(whole)
    for index in range(len(whole)):
        for mine, before in zip(cut.sample(index), whole.sample(index), strict=True):
            assert np.array_equal(mine, before[: longest - 3])
    n_cut = int((whole.lengths > longest - 3).sum())
    assert f"{n_cut} of 12 rows were cut to the {longest - 3} tokens of data.max_length" in caplog.text
    short = folder / "short.jsonl"
    short.write_text('{"query": "w1", "response": "w2"}\n{"query": "' + "w1 " * 50 + '", "response": "w2"}\n')
    left, _ = prepare_data(
        recipe(folder, source=str(short), max_length=50, overflow="truncate", max_dropped=0.5)
    )
    assert len(left) == 1 and "leave nothing of the answer" in caplog.text


@pytest.mark.parametrize("n_long", [1, 3, 100])
def test_the_length_that_would_keep_99_percent_is_suggested(n_long: int, folder: Path) -> None:
    words = [1] * 197 + [20] * n_long + [40] * 1
    lines = [json.dumps({"query": "w1", "response": " ".join(["w2"] * n)}) + "\n" for n in words]
    (folder / "data.jsonl").write_text("".join(lines))
    whole, _ = prepare_data(recipe(folder))
    by_length = np.sort(whole.lengths)
    kept = int(by_length[int(np.ceil(0.99 * len(by_length))) - 1])
    limit = int(by_length[0])
    if n_long == 1:  # 2 of 199 are too long: more than 1 % by a little
        assert kept == by_length[-2]
    with pytest.raises(
        DataError, match=f"; data.max_length {kept} would keep 99 % of the rows, and data.overflow"
    ):
        prepare_data(recipe(folder, max_length=limit))
    again, _ = prepare_data(recipe(folder, max_length=kept))
    assert len(again) >= 0.99 * len(whole)
    with pytest.raises(DataError, match="would keep 99 %"):
        prepare_data(recipe(folder, max_length=kept - 1))
