import base64
import re

import pytest

from dynrank_ds.errors import RunError
from dynrank_ds.report import write_report

from .conftest import metric, write_lines


def summary(text: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th>([^<]+)</th><td>([^<]*)</td></tr>", text))


def embedded(text: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r"src='data:image/png;base64,([^']+)'", text)]


def test_page_holds_its_pictures_and_asks_for_nothing_else(run):
    page = write_report(run)
    text = page.read_text()
    assert page == run / "report.html"
    files = [run / "report" / f"{name}.png" for name in ("ranks", "history", "course")]
    assert embedded(text) == [path.read_bytes() for path in files]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert "http" not in text and "<script" not in text and "<link" not in text
    assert text.count("src=") == 3


def test_summary_and_tables_tell_what_the_files_say(run):
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


def test_a_fixed_rank_run_takes_its_ranks_from_the_checkpoint(lora_run):
    text = write_report(lora_run).read_text()
    assert len(embedded(text)) == 2
    assert summary(text)["Rank of a module"] == "4 → 4"
    assert summary(text)["Adjustments"] == "0"
    assert text.count("None.") == 2


def test_output_may_lie_elsewhere(run, tmp_path):
    page = write_report(run, tmp_path / "elsewhere/page.html")
    assert page.is_file() and (tmp_path / "elsewhere/report/ranks.png").is_file()
    assert not (run / "report.html").exists()


def test_a_line_that_a_kill_cut_short_is_left_out_with_a_warning(run, caplog):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert summary(write_report(run).read_text())["Steps"] == "30"
    assert "cut short" in caplog.text


def test_steps_that_a_resumed_run_did_again_count_once(run):
    lines = [metric(step, 3.0) for step in range(1, 31)] + [metric(step, 1.0) for step in range(21, 31)]
    write_lines(run / "metrics.jsonl", lines)
    table = summary(write_report(run).read_text())
    assert table["Steps"] == "30" and table["Loss, first and last step"] == "3.0000 → 1.0000"


def test_discarded_batches_leave_the_step_before_as_it_was(run):
    lost = {"loss": None, "grad_norm": None, "discarded": True}
    lines = [metric(1, 3.0) | lost, *(metric(step, 2.0) for step in range(1, 31)), metric(30, 2.0) | lost]
    write_lines(run / "metrics.jsonl", lines)
    assert summary(write_report(run).read_text())["Loss, first and last step"] == "2.0000 → 2.0000"


def test_what_is_no_run_is_reported(run, tmp_path):
    with pytest.raises(RunError, match=r"metrics\.jsonl does not exist or is empty"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", lines[1]]))
    with pytest.raises(RunError, match="line 2, is not JSON"):
        write_report(run)
