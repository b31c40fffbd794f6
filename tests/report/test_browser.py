"""The page in a real browser, headless Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dynrank_ds.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

_MEASURE = """<script>
const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
parent.postMessage([document.documentElement.scrollWidth, innerWidth, document.images.length, broken,
  getComputedStyle(document.body).backgroundColor].join("|"), "*");
</script></body>"""
# Chromium's narrowest window is wider than a phone: the page is measured in a frame.
_FRAME = """<title></title><body style="margin: 0">
<script>onmessage = event => { document.title = event.data; }</script>
<iframe src="measured.html" width="WIDTH" height="900" style="border: 0"></iframe></body>
"""


def opened(page: Path, width: int, *options: str) -> tuple[list[str], str]:
    """The measures of the page at this width, and what the browser's console said."""
    page.with_name("measured.html").write_text(page.read_text().replace("</body>", _MEASURE))
    frame = page.with_name("frame.html")
    frame.write_text(_FRAME.replace("WIDTH", str(width)))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--window-size=1400,900",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        *options,
        "--dump-dom",
        frame.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([^<]*\|[^<]*)</title>", ran.stdout)
    assert title, ran.stderr[-2000:]
    return title[1].split("|"), "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_window_and_shows_its_pictures(run: Path, lora_run: Path, width: int) -> None:
    page = write_report(run, compare=[lora_run])
    (scroll, inner, images, broken, background), console = opened(page, width)
    assert int(inner) == width and int(scroll) <= width
    assert (images, broken) == ("11", "0")
    assert background == "rgb(255, 255, 255)"
    assert console == ""


def test_the_page_is_dark_where_the_reader_prefers_it(lora_run: Path) -> None:
    measures, _ = opened(write_report(lora_run), 800, "--blink-settings=preferredColorScheme=0")
    assert measures[-1] == "rgb(20, 25, 31)"


def test_links_lead_to_the_files_beside_the_page(run: Path) -> None:
    page = write_report(run)
    links = re.findall(r'href="([^"]+)"', page.read_text())
    assert len(links) == 20 and all((page.parent / link).is_file() for link in links)
