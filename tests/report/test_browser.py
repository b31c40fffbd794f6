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
document.title = [document.documentElement.scrollWidth, innerWidth, document.images.length, broken,
  getComputedStyle(document.body).backgroundColor].join("|");
</script></body>"""


def opened(page: Path, width: int, *options: str) -> tuple[list[str], str]:
    """The measures of the page in a window of this width, and what the browser's console said."""
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text().replace("</body>", _MEASURE))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        f"--window-size={width},900",
        "--enable-logging=stderr",
        *options,
        "--dump-dom",
        measured.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([^<]*\|[^<]*)</title>", ran.stdout)
    assert title, ran.stderr[-2000:]
    return title[1].split("|"), "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_window_and_shows_its_pictures(run: Path, lora_run: Path, width: int) -> None:
    page = write_report(run, compare=[lora_run])
    (scroll, inner, images, broken, background), console = opened(page, width)
    # Chromium's narrowest window is wider than a phone: the page is measured in the window that it got.
    assert int(scroll) <= int(inner)
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
