import json
import re
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from dynrank_ds.data.gsm_symbolic import GsmSymbolicFiles, main, write_gsm_symbolic
from dynrank_ds.errors import DataError

PLAIN_EQUATION = re.compile(
    r"(?<![.%/*+-] )(?<![\d.%/*+-])(\d+(?:\.\d+)? ?[-+*/] ?\d+(?:\.\d+)?) ?= ?(\d+(?:\.\d+)?)"
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> GsmSymbolicFiles:
    return write_gsm_symbolic(tmp_path_factory.mktemp("gsm"), n_train=3200)


def write_at_once(folder: Path, start: float) -> bytes:
    time.sleep(max(0.0, start - time.time()))
    return write_gsm_symbolic(folder, n_train=160).train.read_bytes()


def test_processes_that_start_together_on_an_empty_cache_all_find_the_same_file(
    tmp_path: Path, files: GsmSymbolicFiles
) -> None:
    with ProcessPoolExecutor(4) as pool:
        found = [pool.submit(write_at_once, tmp_path, time.time() + 0.5) for _ in range(4)]
        contents = {future.result() for future in found}
    assert len(contents) == 1
    assert not [*tmp_path.glob("*.tmp")]


def test_no_held_out_problem_was_trained_on(files: GsmSymbolicFiles) -> None:
    train, held_out, unseen = read(files.train), read(files.held_out), read(files.unseen)
    trained = {row["query"] for row in train}
    asked = [problem["question"] for problem in held_out + unseen]
    assert len(trained) == len(train) == 3200 and len(set(asked)) == len(asked) == 480
    assert trained.isdisjoint(asked)
    assert {row["template"] for row in train}.isdisjoint({problem["template"] for problem in unseen})

    def numbers(template: int, text: str) -> tuple[int, list[str]]:
        return template, re.findall(r"\d+(?:\.\d+)?", text)

    drilled = [numbers(row["template"], row["query"]) for row in train]
    assert not any(numbers(problem["template"], problem["question"]) in drilled for problem in held_out)


def test_files_are_balanced_over_their_templates_from_the_first_row_on(files: GsmSymbolicFiles) -> None:
    held_out = [problem["template"] for problem in read(files.held_out)]
    assert set(Counter(held_out).values()) == {20} and len(set(held_out)) == 16
    assert len(set(held_out[:16])) == 16
    assert set(Counter(row["template"] for row in read(files.train)).values()) == {200}
    assert set(Counter(problem["template"] for problem in read(files.unseen)).values()) == {20}


def test_responses_have_metamaths_form_and_true_equations(files: GsmSymbolicFiles) -> None:
    equations = 0
    for row in read(files.train):
        solution, answer = re.fullmatch(r"(.+)\nThe answer is: (\d+)", row["response"], re.DOTALL).groups()
        assert not re.search(r"####|<<|>>", row["response"])
        assert float(re.findall(r"\d+(?:\.\d+)?", solution.replace(",", ""))[-1]) == float(answer)
        for left, right in PLAIN_EQUATION.findall(solution):
            equations += 1
            assert eval(left) == pytest.approx(float(right), abs=0.01), row
    assert equations > 1000


def test_the_same_arguments_give_the_same_bytes(files: GsmSymbolicFiles, tmp_path: Path) -> None:
    fewer, again = (write_gsm_symbolic(tmp_path / name, n_train=160) for name in ("fewer", "again"))
    other = write_gsm_symbolic(tmp_path / "other", n_train=160, seed=1)
    assert again.train.read_bytes() == fewer.train.read_bytes() != other.train.read_bytes()
    assert fewer.held_out.read_bytes() == files.held_out.read_bytes(), "whatever the number of training rows"


def test_more_problems_than_a_template_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"template 26 gives only \d+ different train problems, 3000 were"):
        write_gsm_symbolic(tmp_path, n_train=3000, n_templates=1)
    assert not any(tmp_path.iterdir())


def test_the_command_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--train", "32", "--held-out", "16", "--unseen", "8"]) == 0
    assert [len(read(Path(line))) for line in capsys.readouterr().out.splitlines()] == [32, 16, 8]


def test_the_command_reports_a_mistake_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path), "--templates", "80"]) == 2
    assert "80 templates and 8 unseen ones were asked for" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.jsonl", "gsm_symbolic.jsonl", "gsm_symbolic_unseen.jsonl"])
def test_a_file_of_the_same_name_with_other_content_is_kept(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine\n")
    assert main(["--output", str(tmp_path), "--train", "16", "--held-out", "16", "--unseen", "8"]) == 2
    assert "is there with other content: name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine\n"
