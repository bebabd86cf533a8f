"""A report's page in headless Chromium: no word on the console, nothing wider than the screen, pictures of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lte_scale.report.style import THEMES
from tests.report_runs import full_run, make

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if os.environ.get("REQUIRE_CHROMIUM") == "1" and CHROMIUM is None:
    raise RuntimeError("REQUIRE_CHROMIUM=1, but there is no chromium: apt-get install chromium")
pytestmark = [pytest.mark.observability, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

# Said by a copy of the page that may run it: its width, and what sticks out of it without being in a box that scrolls.
MEASURE = """<script>addEventListener("load", () => {
const seen = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide,pre,svg svg"));
parent.postMessage({
  width: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  outside: seen.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
  paper: getComputedStyle(document.body).backgroundColor, columns: new Set([...document.querySelectorAll(
    "#curves ~ .panels figure")].map(e => e.getBoundingClientRect().left)).size,
}, "*")})</script>"""
# Chromium's own windows are 500 pixels wide at least: the page of a phone is a frame in one.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
addEventListener("message", event => document.body.dataset.measured = JSON.stringify(event.data))</script>
<iframe src="{name}" style="border:0;display:block;width:{width}px;height:{height}px"></iframe>"""


def chromium(folder: Path, name: str, *arguments: str, dark: bool = False) -> tuple[str, list[str]]:
    """What it prints of a page in `folder`, and the lines of the console."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", *arguments, (folder / name).as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    text, replaced = policy.subn("", page.read_text())
    assert replaced == 1
    page.with_name("copy.html").write_text(text.replace("</body>", MEASURE + "</body>"))
    page.with_name("frame.html").write_text(FRAME.format(name="copy.html", width=width, height=900))
    dom, console = chromium(page.parent, "frame.html", "--dump-dom", dark=dark)
    assert not console
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found, dom
    return json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def screenshot(page: Path, width: int, height: int, *, dark: bool = False) -> np.ndarray:
    """The page as it is; also under $LTE_SCREENSHOTS, if set."""
    kind = f"{page.parent.name}-{width}-{'dark' if dark else 'light'}.png"
    path = page.with_name(kind)
    page.with_name("frame.html").write_text(FRAME.format(name=page.name, width=width, height=height))
    size = f"--window-size={max(width, 500)},{height}"
    _, console = chromium(page.parent, "frame.html", f"--screenshot={path}", size, dark=dark)
    assert not console
    with Image.open(path) as image:
        image.convert("RGB").crop((0, 0, width, height)).save(path)
    if folder := os.environ.get("LTE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, Path(folder) / f"report-{kind}")
    with Image.open(path) as image:
        return np.asarray(image)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one run, and of three with long names."""
    folder = tmp_path_factory.mktemp("report")
    first = full_run(folder / "demo")
    others = [
        full_run(folder / f"a_run_with_a_rather_long_name_{i}", steps=400 * i, heads=8, speed=1 + i / 4) for i in (1, 2)
    ]
    make(first, out=folder / "one")
    make(first, *others, out=folder / "three")
    return {name: folder / name / "report.html" for name in ("one", "three")}


def test_the_console_is_heard(tmp_path: Path) -> None:
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    (tmp_path / "bad.html").write_text(f"<!doctype html>{policy}<style>p{{color:red}}</style><p>refused")
    _, console = chromium(tmp_path, "bad.html", "--dump-dom")
    assert console and "Content Security Policy" in console[0]


@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1280, 2)])
def test_the_page_opens_and_fits(pages: dict[str, Path], name: str, width: int, columns: int) -> None:
    page = pages[name]
    found = measured(page, width)
    assert found["width"] == width and not found["outside"]
    assert found["columns"] == columns
    pixels = screenshot(page, width, found["height"])
    assert pixels.shape == (found["height"], width, 3)
    assert tuple(pixels[2, 2]) == rgb(THEMES["light"]["paper"])
    assert (np.ptp(pixels.astype(int), axis=2) > 60).mean() > 0.003  # curves and bars


def test_dark_where_the_reader_has_it_dark(pages: dict[str, Path]) -> None:
    found = measured(pages["one"], 1280, dark=True)
    paper = rgb(THEMES["dark"]["paper"])
    assert found["paper"] == f"rgb({', '.join(map(str, paper))})"
    pixels = screenshot(pages["one"], 1280, found["height"], dark=True)
    assert tuple(pixels[2, 2]) == paper
    assert np.median(pixels) < 40
