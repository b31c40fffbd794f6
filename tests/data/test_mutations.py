"""1,000 damaged files: each ends in samples, counted drops or one clear sentence, in time, never in anything else."""

import io
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from dynrank_ds.data.formats import FORMATS
from dynrank_ds.data.rows import Drops
from dynrank_ds.data.sources import open_source, select
from dynrank_ds.data.tokenising import tokenise
from dynrank_ds.errors import DataError

ROWS = [{"query": f"How many is {n} + {n}?", "response": f"It is {2 * n}.", "lang": "en"} for n in range(6)]
Mutation = Callable[[bytes, random.Random], bytes]


def _truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _flipped(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 20)):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    return bytes(damaged)


def _with_nulls(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + b"\0" * draw.randint(1, 50) + data[place:]


def _spliced(data: bytes, draw: random.Random) -> bytes:
    start, place = sorted(draw.randrange(len(data)) for _ in range(2))
    return data[:place] + data[start:place] + data[place:]


def _recoded(data: bytes, draw: random.Random) -> bytes:
    return data.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"]))


def _huge_line(data: bytes, draw: random.Random) -> bytes:
    filling = draw.choice([b"x", b"[", b'{"query":', b"9", b"\\ud800"])
    words = draw.choice(["w", "w "]) * 100_000
    whole = json.dumps({"query": words, "response": draw.choice(["short", words]), "lang": "en"}).encode()
    line = draw.choice([filling * (200_000 // len(filling)), whole])
    return data + line + draw.choice([b"", b"\n" + data])


def _other_values(data: bytes, draw: random.Random) -> bytes:
    strange = [None, 5, 1e400, [], {}, "", " ", True, "\ud800", "</s>", "w " * 3000, [["query"]], "\0"]
    lines = [json.loads(line) for line in data.decode().splitlines()]
    for line in draw.sample(lines, draw.randint(1, len(lines))):
        field = draw.choice(sorted(line))
        line[field] = draw.choice(strange)
        if draw.random() < 0.3:
            line[draw.choice(["Query", "respons", ""])] = line.pop(field)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _other_column(data: bytes, draw: random.Random) -> bytes:
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    n = len(table)
    strange = [
        pyarrow.nulls(n),
        pyarrow.array(range(n)),
        pyarrow.array([[[1.5]]] * n),
        pyarrow.array([{"query": "q"}] * n),
        pyarrow.array([b"\xff\xfe"] * n),
        pyarrow.array([b"\xff\xfe"] * n).view(pyarrow.string()),
        pyarrow.array(["w " * 100_000, None, "", " ", "</s>", "w"]),
    ]
    column = draw.randrange(table.num_columns)
    name = draw.choice([table.column_names[column]] * 3 + ["Query", ""])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.set_column(column, name, draw.choice(strange)), file)
    return file.getvalue()


JSONL: list[Mutation] = [_truncated, _flipped, _with_nulls, _spliced, _recoded, _huge_line, _other_values]
PARQUET: list[Mutation] = [_truncated, _flipped, _with_nulls, _spliced, _other_column]


class TooLateError(BaseException):
    """Nothing may catch it: no Exception."""


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Ends what runs in it after so many seconds."""

    def ring(*_: object) -> None:
        raise TooLateError(f"no outcome after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(path: Path, tokenizer: PreTrainedTokenizerFast, filtered: bool) -> str:
    """samples, drops, or error; anything else is raised."""
    drops = Drops()
    try:
        rows = select(open_source(str(path)).rows(), {"lang": "en"} if filtered else {}, None)
        for _ in tokenise(rows, tokenizer, FORMATS["metamathqa"], 500, drops):
            pass
        drops.check(max_dropped=1.0)
    except DataError as error:
        assert str(error).startswith(str(path)) or "rows cannot be trained on" in str(error), error
        assert "\n" not in str(error) and len(str(error)) < 3000, error
        return "error"
    return "drops" if drops.n_dropped else "samples"


@pytest.mark.parametrize("tokenizer", [True], ids=["with bos"], indirect=True)
@pytest.mark.parametrize(("ending", "mutations", "count"), [("jsonl", JSONL, 700), ("parquet", PARQUET, 300)])
def test_a_damaged_file_gives_a_clear_error_or_a_counted_drop(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, ending: str, mutations: list[Mutation], count: int
) -> None:
    seed = 5
    print(f"seed {seed}")
    draw = random.Random(seed)
    whole = tmp_path / f"whole.{ending}"
    if ending == "jsonl":
        whole.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), whole)
    assert outcome(whole, tokenizer, False) == "samples"
    outcomes = {mutate.__name__: Counter[str]() for mutate in mutations}
    path = tmp_path / f"damaged.{ending}"
    for number in range(count):
        mutate = mutations[number % len(mutations)]
        path.write_bytes(mutate(whole.read_bytes(), draw))
        with deadline(10):
            outcomes[mutate.__name__][outcome(path, tokenizer, draw.random() < 0.2)] += 1
    print(outcomes)
    assert sum(map(Counter.total, outcomes.values())) == count
    for name, of_kind in outcomes.items():
        assert of_kind["error"] + of_kind["drops"] >= 20, f"{name} does hardly any damage"
