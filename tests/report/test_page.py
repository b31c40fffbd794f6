import base64
import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from dynrank_ds.errors import RunError
from dynrank_ds.report import watch_report, write_report
from dynrank_ds.report.canvas import Plot

from .conftest import START, metric, write_lines, write_run

FIGURES = (
    "ranks",
    "history",
    "paths",
    "course",
    "gradients",
    "importance",
    "scores",
    "correlation",
    "variance",
    "utilisation",
)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes seconds a page."""

    def written(plot: Plot, folder: Path) -> dict[str, object]:
        return {"data": "AAAA", "alt": plot.alt, "caption": plot.caption, "files": [], "width": 1}

    monkeypatch.setattr("dynrank_ds.report.page._written", written)


def summary(text: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th>([^<]+)</th><td>([^<]*)</td></tr>", text))


def embedded(text: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]


def test_page_holds_its_pictures_and_asks_for_nothing_else(run):
    page = write_report(run)
    text = page.read_text()
    assert page == run / "report.html"
    files = [run / "report" / f"{name}.png" for name in FIGURES]
    assert embedded(text) == [path.read_bytes() for path in files]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert "http" not in text and "<script" not in text and "<link" not in text
    assert text.count("src=") == len(FIGURES)


def test_every_figure_has_a_caption_and_its_data_and_picture_as_files(run):
    text = write_report(run).read_text()
    assert text.count("<figcaption>") == len(FIGURES)
    for name in FIGURES:
        assert f'href="report/{name}.csv"' in text and f'href="report/{name}.svg"' in text
        rows = list(csv.reader((run / "report" / f"{name}.csv").open()))
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1, name
        assert "<svg" in (run / "report" / f"{name}.svg").read_text()


@pytest.mark.usefixtures("without_pictures")
def test_summary_and_tables_show_what_the_files_hold(run):
    text = write_report(run).read_text()
    assert summary(text) == {
        "Method": "pe_dyra",
        "Base model": "&lt;tiny&gt;",
        "Steps": "30",
        "Loss, first and last step": "2.9667 → 2.0000",
        "Adjustments": "2",
        "Modules whose rank changed": "3 of 36",
        "Total rank": "144 → 144",
        "Rank of a module": "4 → 1 to 9",
        "Trainable parameters": "1,001 → 1,030",
        "Tokens per second, median": "116",
        "Peak memory": "1.50 GiB",
    }
    rows = re.findall(r"<tr><td>([^<]+)</td><td>(\d+)</td><td>(\d+)</td><td>([+-]\d+)</td></tr>", text)
    assert rows == [
        ("model.layers.11.mlp.down_proj", "4", "9", "+5"),
        ("model.layers.2.self_attn.v_proj", "4", "1", "-3"),
        ("model.layers.0.self_attn.q_proj", "4", "2", "-2"),
    ]


@pytest.mark.usefixtures("without_pictures")
def test_a_fixed_rank_run_takes_its_ranks_from_the_checkpoint(lora_run):
    text = write_report(lora_run).read_text()
    assert len(embedded(text)) == 4
    assert "Ranks were never adjusted" in text
    assert summary(text)["Rank of a module"] == "4 → 4"
    assert summary(text)["Adjustments"] == "0"
    assert text.count("None.") == 2


STATE = dict(state="failed", step=3, total_steps=30, error="the disk is full.", how_to_continue="see to it")


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("changed", "step", "said"),
    [
        ({}, 3, "The run failed at step 3 of 30: the disk is full. To go on: see to it."),
        ({"state": "stopped"}, 3, "stopped by a signal at step 3 of 30 and has saved: see to it."),
        (
            {"state": "starting"},
            30,
            "it trains, or it was killed and could not say so. Its last line is of step 30 of 30.",
        ),
        (
            {"state": "running"},
            30,
            "it trains, or it was killed and could not say so. Its last line is of step 30 of 30.",
        ),
    ],
)
def test_a_run_that_did_not_finish_has_a_page_that_says_so(run, changed, step, said):
    (run / "state.json").write_text(json.dumps(STATE | changed))
    text = write_report(run).read_text()
    assert said in text and summary(text)["State"].endswith(f"step {step} of 30")


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "elalora", "t_i": 4, "interval": 5, "t_f": 6}, "the first of 3 is planned after step 9."),
        ({"name": "lora"}, "Ranks were never adjusted: lora has fixed ranks."),
    ],
)
def test_a_run_without_adjustment_says_when_the_first_is_planned(tmp_path, method, said):
    run = write_run(tmp_path / "run", START, method["name"])
    (run / "state.json").write_text(json.dumps(STATE))
    (run / "recipe.resolved.yaml").write_text(json.dumps({"method": method, "model": {"path": "m"}}))
    assert said in write_report(run).read_text()


def test_output_may_lie_elsewhere(run, tmp_path):
    page = write_report(run, tmp_path / "elsewhere/page.html")
    assert page.is_file() and (tmp_path / "elsewhere/report/ranks.png").is_file()
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("without_pictures")
def test_a_line_that_a_kill_cut_short_is_left_out_with_a_warning(run, caplog):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert summary(write_report(run).read_text())["Steps"] == "30"
    assert "cut short" in caplog.text


@pytest.mark.usefixtures("without_pictures")
def test_steps_that_a_resumed_run_did_again_count_once(run):
    lines = [metric(step, 3.0) for step in range(1, 31)] + [metric(step, 1.0) for step in range(21, 31)]
    write_lines(run / "metrics.jsonl", lines)
    table = summary(write_report(run).read_text())
    assert table["Steps"] == "30" and table["Loss, first and last step"] == "3.0000 → 1.0000"


@pytest.mark.usefixtures("without_pictures")
def test_discarded_batches_leave_the_step_before_as_it_was(run):
    lost = {"loss": None, "grad_norm": None, "discarded": True}
    lines = [metric(1, 3.0) | lost, *(metric(step, 2.0) for step in range(1, 31)), metric(30, 2.0) | lost]
    write_lines(run / "metrics.jsonl", lines)
    assert summary(write_report(run).read_text())["Loss, first and last step"] == "2.0000 → 2.0000"


@pytest.mark.usefixtures("without_pictures")
def test_what_is_no_run_is_reported(run, tmp_path):
    with pytest.raises(RunError, match=r"metrics\.jsonl does not exist or is empty"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", lines[1]]))
    with pytest.raises(RunError, match="line 2, is not JSON"):
        write_report(run)


@pytest.mark.usefixtures("without_pictures")
def test_a_run_without_a_checkpoint_has_a_page_that_says_so(run):
    shutil.rmtree(run / "checkpoints")
    text = write_report(run).read_text()
    assert len(embedded(text)) == len(FIGURES) - 1
    assert "No checkpoint was written yet" in text and summary(text)["Total rank"] == "144 → 144"


def test_a_run_of_one_step_has_a_page(lora_run):
    write_lines(lora_run / "metrics.jsonl", [metric(1, 3.0)])
    assert summary(write_report(lora_run).read_text())["Steps"] == "1"


def test_a_run_that_finished_no_step_has_a_page_that_says_so(tmp_path):
    (tmp_path / "recipe.resolved.yaml").write_text("method: {name: elalora}\nmodel: {path: some/model}\n")
    text = write_report(tmp_path).read_text()
    assert "No step was finished yet" in text and embedded(text) == []
    assert summary(text) == {"Method": "elalora", "Base model": "some/model"}


def test_compared_runs_are_rows_of_a_table_and_lines_of_a_figure(run, lora_run):
    results = {"tasks": {"gsm8k": {"score": 0.425, "interval": [0.372, 0.48]}}}
    (run / "eval").mkdir()
    (run / "eval" / "results.json").write_text(json.dumps(results))
    text = write_report(run, compare=[lora_run]).read_text()
    head, dynamic, fixed = re.findall(r"<tr>(.*?)</tr>", text.split("Compared runs")[1])[:3]
    cells = [re.findall(r"<t[hd]>([^<]*)</t[hd]>", row) for row in (head, dynamic, fixed)]
    assert cells[0][:2] == ["run", "method"] and cells[0][-1] == "gsm8k"
    assert cells[1] == [
        "run",
        "pe_dyra",
        "30",
        "2.0000",
        "-",
        "1,030",
        "0.500",
        "0.2 min",
        "1.50 GiB",
        "42.5 % [37.2, 48.0]",
    ]
    assert cells[2][:2] == ["lora", "lora"] and cells[2][-1] == "-"
    assert cells[2][5:9] == ["1,030 (100 %)", "0.500 (100 %)", "0.2 min (100 %)", "1.50 GiB (100 %)"]
    rows = list(csv.reader((run / "report" / "comparison.csv").open()))
    assert {row[0] for row in rows[1:]} == {"run", "lora"} and len(rows) == 61


@pytest.mark.usefixtures("without_pictures")
def test_a_watched_page_renews_itself_until_the_run_ends(run, monkeypatch):
    (run / "state.json").write_text(json.dumps(STATE | {"state": "starting"}))
    pauses = []

    def pause(seconds):
        pauses.append((seconds, (run / "report.html").read_text().count("http-equiv")))
        if len(pauses) == 2:
            (run / "state.json").write_text(json.dumps(STATE | {"state": "finished"}))

    monkeypatch.setattr("dynrank_ds.report.watch.time.sleep", pause)
    watch_report(run, seconds=7)
    assert pauses == [(7, 1), (7, 1)]
    assert "http-equiv" not in write_report(run).read_text()
