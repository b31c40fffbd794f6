import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from dynrank_ds.data import reading
from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.rows import Row
from dynrank_ds.data.sources import GENERATED, open_source, select
from dynrank_ds.errors import DataError


def load_rows(source: str, limit: int | None = None, **choices: object) -> list[Row]:
    return list(select(open_source(source, **choices).rows(), {}, limit))


def write(path: Path, *lines: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_rows_keep_order_fields_and_line_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}', "", '{"query": "ü"}')
    assert load_rows(source) == [
        Row({"query": "a"}, f"{source}, line 1"),
        Row({"query": "ü"}, f"{source}, line 3"),
    ]


def test_limit_reads_no_further_than_it_must(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}', "broken")
    assert len(load_rows(source, limit=1)) == 1


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"query": "t"}')
    write(tmp_path / "test.jsonl", '{"query": "e"}')
    assert load_rows(str(tmp_path))[0].fields == {"query": "t"}
    assert load_rows(str(tmp_path), split="test")[0].fields == {"query": "e"}


def test_a_part_of_a_file_and_a_revision_off_the_hub_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}')
    for place in (source, GENERATED):
        with pytest.raises(DataError, match=f"data.split is 'test', but {place} has no parts: leave it out"):
            open_source(place, split="test")
    for place in (source, str(tmp_path), GENERATED):
        with pytest.raises(
            DataError, match=f"data.revision is 'v2', but {place} is not of the hub: leave it"
        ):
            open_source(place, revision="v2")


def test_only_rows_that_pass_the_filter_count_towards_the_limit(tmp_path: Path) -> None:
    langs = ["python", "sql", "python", "rust", "python"]
    rows = [Row({"lang": lang, "n": n}, f"row {n}") for n, lang in enumerate(langs)]
    assert [r.fields["n"] for r in select(rows, {"lang": "python"}, 2)] == [0, 2]
    assert [r.fields["n"] for r in select(rows, {"lang": ("sql", "rust")}, None)] == [1, 3]
    assert [r.fields["n"] for r in select(rows, {"lang": "python", "n": 4}, None)] == [4]
    with pytest.raises(DataError, match=r"row 0: data.filter names the field 'language', which is missing"):
        list(select(rows, {"language": "python"}, None))


def test_parquet_files_and_their_shards_are_read_row_by_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    shards = [tmp_path / "data" / f"train-0000{i}-of-00002.parquet" for i in range(2)]
    for i, shard in enumerate(shards):
        parquet.write_table(pyarrow.table({"query": [f"{i}a", f"{i}b"]}), shard)
    rows = load_rows(str(tmp_path))
    assert [row.fields["query"] for row in rows] == ["0a", "0b", "1a", "1b"]
    assert rows[3].origin == f"{shards[1]}, row 1"
    assert load_rows(str(shards[1]))[0].fields == {"query": "1a"}
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    with pytest.raises(DataError, match=r"00001-of-00002.parquet, after row 0: not a readable Parquet file"):
        load_rows(str(tmp_path))


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The library, with a cache of its own."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return library


@pytest.mark.parametrize("streaming", [False, True])
def test_other_folders_are_read_through_datasets(
    datasets: ModuleType, tmp_path: Path, streaming: bool
) -> None:
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "rows.csv").write_text("query,response\na,1\nb,2\n")
    rows = load_rows(str(folder), limit=1, streaming=streaming)
    assert rows == [Row({"query": "a", "response": 1}, f"{folder}, train row 0")]
    with pytest.raises(DataError, match="split 'nothing' cannot be loaded"):
        load_rows(str(folder), split="nothing", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_asked_for_by_id_split_and_revision(
    datasets: ModuleType, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is played by a folder: the rest is the library's real loading."""
    write(tmp_path / "hub" / "train.jsonl", '{"query": "a"}', '{"query": "b"}')
    real, asked = datasets.load_dataset, []

    def from_folder(name: str, **choices: object) -> object:
        asked.append((name, choices.pop("revision"), choices["streaming"]))
        return real(str(tmp_path / "hub"), **choices)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    source = open_source("owner/name", revision="abc", streaming=streaming)
    assert [row.fields for row in source.rows()] == [{"query": "a"}, {"query": "b"}]
    assert next(source.rows()).origin == "owner/name, train row 0"
    assert set(asked) == {("owner/name", "abc", streaming)}


def test_what_a_source_holds_is_identified_by_content_not_by_place(tmp_path: Path) -> None:
    first, same = (write(tmp_path / name, '{"query": "a"}') for name in ("1.jsonl", "2.jsonl"))
    other = write(tmp_path / "3.jsonl", '{"query": "b"}')
    identities = [open_source(source).identity() for source in (first, same, other)]
    assert identities[0] == identities[1] != identities[2]
    assert open_source("a/b").identity() != open_source("a/b", revision="v2").identity()
    assert open_source("a/b").identity() != open_source("a/b", split="test").identity()


def test_what_a_folder_for_datasets_holds_is_identified_by_content_too(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "same", "other")]
    for folder, row in zip(folders, ("a,1", "a,1", "b,1"), strict=True):
        write(folder / "train" / "rows.csv", "query,response", row)
    identities = [open_source(str(folder)).identity() for folder in folders]
    assert identities[0] == identities[1] != identities[2]
    assert open_source(str(folders[0]), split="test").identity() != identities[0]


def test_generated_rows_are_made_once_and_fit_the_metamathqa_format(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    rows = list(open_source(GENERATED, n_generated=16, generated=tmp_path).rows())
    assert len(rows) == 16 and FORMATS["metamathqa"].text(rows[0], None).text.count("The answer is: ") == 1
    made = [path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")]
    open_source(GENERATED, n_generated=16, generated=tmp_path)
    assert made == [path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"query": "a"',
            r"line 2: not valid JSON \(Expecting ',' delimiter at column \d+\), each line must be one JSON object",
        ),
        ("[1, 2]", "line 2: a list, but each line must be one JSON object"),
        ("[" * 200_000, "line 2: JSON that cannot be read"),
        ('{"query": ' + "9" * 5000 + "}", "line 2: JSON that cannot be read"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}', line)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(source)
    assert str(caught.value).startswith(source)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_LONGEST_LINE", 100)
    source = write(tmp_path / "rows.jsonl", '{"query": "a"}', '{"query": "' + "a" * 200 + '"}')
    with pytest.raises(DataError, match="line 2: longer than 100 bytes"):
        load_rows(source)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"query": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8 text"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "q"}, r"field 'response' is missing \(fields there: query\)"),
        ({"query": "q", "response": 7}, r"field 'response' is 7 \(int\), it must be text"),
        ({"query": "q", "response": " \n"}, "field 'response' is empty"),
        ({"query": None, "response": "r"}, r"field 'query' is None \(NoneType\)"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(tmp_path: Path, fields: dict, message: str) -> None:
    row = load_rows(write(tmp_path / "rows.jsonl", json.dumps(fields)))[0]
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: {message}"):
        FORMATS["metamathqa"].text(row, None)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere/rows.jsonl", "./set"])
def test_a_missing_file_is_refused_without_asking_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=f"{source}: no such file or folder"):
        load_rows(source)


def test_a_connection_that_breaks_while_streaming_is_one_sentence(
    datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_rows(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"query": "a"}
        yield {"query": "b"}
        raise httpx.ReadTimeout("The read operation timed out")

    monkeypatch.setattr(datasets, "load_dataset", two_rows)
    with pytest.raises(DataError) as caught:
        load_rows("owner/name", streaming=True)
    assert str(caught.value) == (
        "owner/name: split 'train' cannot be loaded by datasets, after row 2 (The read operation timed out)"
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", b'query,response\na,1\n"b,2\n', "EOF inside string"),
        ("rows.csv", b"query,response\na,\xff\xfe\n", "codec can't decode"),
        ("rows.json.gz", b"\x1f\x8b\x08 no gzip", ""),
        ("rows.arrow", b"ARROW1 no arrow", ""),
    ],
)
def test_a_damaged_file_that_datasets_reads_is_named_with_the_reason(
    datasets: ModuleType,
    tmp_path: Path,
    name: str,
    content: bytes,
    reason: str,
    streaming: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train" / name).write_bytes(content)
    with pytest.raises(
        DataError, match=f"set: split 'train' cannot be loaded by datasets, .*{reason}"
    ) as caught:
        load_rows(str(tmp_path / "set"), streaming=streaming)
    assert "\n" not in str(caught.value)
    assert "Failed to read" not in capfd.readouterr().err, "reported once, by us"


def test_a_hub_data_set_that_cannot_be_reached_is_one_sentence(
    datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing-at-all: split 'train' cannot be loaded by datasets"):
        load_rows("nobody/nothing-at-all")
