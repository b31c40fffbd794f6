from __future__ import annotations

from pathlib import Path

import pytest

from dynrank_ds.bench.cli import main
from tests.support.tiny import write_data, write_model


def test_the_data_benchmark_prints_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"model.path={write_model(tmp_path / 'model')}", "data.max_length=400"]
    overrides.append(f"data.source={write_data(tmp_path / 'data.jsonl', samples=130)}")
    assert main(["data", "--quick", *overrides]) == 0
    out = capsys.readouterr().out
    assert out.count("rows/s") == 2 and out.count("samples/s") == 2 and out.count("padding and waiting") == 2


def test_mistakes_are_reported_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--quick", "data.source=./nowhere.jsonl"]) == 2
    assert (
        capsys.readouterr().err
        == "error: ./nowhere.jsonl: no such file or folder, and not a hub id either (owner/name)\n"
    )
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "there is no benchmark 'speed': known are data, " in capsys.readouterr().err
