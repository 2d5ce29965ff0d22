"""The page in headless Chromium, at the widths of a phone, a tablet and a desk; skipped where no Chromium is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detdistill.report.page import build_report
from tests.report.runs import write_experiment, write_run

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium")]
WIDTHS = {"phone": 500, "tablet": 820, "desk": 1400}
"""Pixels; Chromium's windows are at least 500 wide."""
TELL = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(one => one.getBoundingClientRect().right > innerWidth + 1
    && !one.closest("[style*=overflow], .scroll, .wide, pre, table, figure, svg"));
  document.body.dataset.told = [innerWidth, document.documentElement.scrollWidth, wide.length].join(" ");
})</script></body>"""


def browse(page: Path, width: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--window-size={width},2000", "--enable-logging=stderr", "--v=0", f"--user-data-dir={page.parent / 'profile'}"]
    return subprocess.run([*command, *words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 runs: a teacher, four baselines, and three methods with four seeds each."""
    folder = tmp_path_factory.mktemp("page")
    runs = [write_run(folder / "teacher", "teacher", 0.41)]
    for method, gain in (("pkd", 0.03), ("mgd", 0.01), ("fgd,profile=anchor_free", -0.01)):
        alone = [0.30, 0.31, 0.29, 0.30]
        experiment = write_experiment(folder / method.split(",")[0], method, alone, [one + gain for one in alone])
        runs += experiment if method == "pkd" else [run for run in experiment if "baseline" not in run.name]
    return build_report(runs, folder / "report.html")


@pytest.mark.parametrize("device", WIDTHS)
def test_page_fits_the_screen_and_says_nothing_on_the_console(page: Path, tmp_path: Path, device: str) -> None:
    width = WIDTHS[device]
    told = tmp_path / "told.html"
    content = page.read_text()
    assert content.count("</body>") == 1
    told.write_text(content.replace("</body>", TELL))
    shown = browse(told, width, "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    found = re.search(r'data-told="([^"]*)"', shown.stdout)
    assert found, "the script has not run"
    inner, scroll, outside = (float(number) for number in found[1].split())
    assert inner == width
    assert scroll <= width, f"{scroll - width} pixels must be scrolled to the side"
    assert outside == 0
    picture = tmp_path / f"{device}.png"
    browse(page, width, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[1] == width
    assert pixels.std() > 10, "an empty picture"


def test_dark_mode_is_dark(page: Path, tmp_path: Path) -> None:
    means = []
    for words in ((), ("--blink-settings=preferredColorScheme=0",)):
        picture = tmp_path / f"{len(means)}.png"
        browse(page, 820, f"--screenshot={picture}", *words)
        means.append(np.asarray(Image.open(picture).convert("L")).mean())
    assert max(means) > 200
    assert min(means) < 80
