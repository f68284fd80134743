"""The HTML page in a browser: no errors or requests, fits the window, legible in light and dark mode."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from pipeline.report.page import write_page
from pipeline.report.per_class import read_class_results
from pipeline.report.results import compare_all, read_runs
from tests.support.commands import ROOT
from tests.unit.report.test_page import STRANGE, write_history
from tests.unit.report.test_report import write_run

UBUNTU = Path("/etc/os-release").exists() and platform.freedesktop_os_release()["ID"] == "ubuntu"
"""Their Chromium is a snap, which containers cannot run and which cannot read temporary files."""
PROGRAMS = ("google-chrome",) if UBUNTU else ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
UNAVAILABLE = ROOT / ".venv" / "without-browser"
"""Written by .ci/setup.sh if it installs no browser; tests are skipped only if it gives a reason."""
WHY = UNAVAILABLE.read_text().strip() if UNAVAILABLE.exists() else ""
pytestmark = pytest.mark.skipif(PROGRAM is None and bool(WHY), reason=WHY or "there is a browser")
START_MS, ANSWER_MS = 90_000, 60_000
CONTRAST = """
(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const ratio = (element, property) => {
    const [a, b] = [light(getComputedStyle(element)[property]), light(behind(element))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const least = (selector, property) =>
    Math.min(...[...document.querySelectorAll(selector)].map((element) => ratio(element, property)));
  return {text: least("p, dt, dd, a, th, td, h1, h2, h3, summary, li, .tag, pre", "color"),
          drawn: least(".line > path, .interval > path", "stroke"), ticks: least("svg text", "fill"),
          background: light(behind(document.body))};
})()
"""
"""Minimum contrast of each kind, as defined by WCAG 2, and the page's lightness."""


@dataclass
class LoadedPage:
    """A fully loaded page, with its requests and messages."""

    page: Page
    requests: list[str] = field(default_factory=list)
    """URLs of all requests except for the page itself and data: URIs."""
    complaints: list[str] = field(default_factory=list)
    """Console messages, uncaught errors, and what the browser logs about the page."""

    def value_of(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.page.evaluate(expression)


Open = Callable[..., LoadedPage]
"""(file, *, width in CSS pixels, dark, media) -> the page"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM is not None, f"none of {', '.join(PROGRAMS)} is installed; `make setup` installs Debian's chromium"
    # No host name resolves. Playwright turns off the browser's own background requests.
    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=PROGRAM, args=arguments, chromium_sandbox=False, timeout=START_MS
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    contexts: list[BrowserContext] = []

    def open_page(path: Path, *, width: int = 1200, dark: bool = False, media: Any = "screen") -> LoadedPage:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            is_mobile=width < 600,
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        context.set_default_timeout(ANSWER_MS)
        page = context.new_page()
        page.emulate_media(media=media)
        opened = LoadedPage(page)
        page.on("request", lambda request: opened.requests.append(request.url))
        page.on("console", lambda message: opened.complaints.append(message.text))
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.goto(path.as_uri(), wait_until="load")
        opened.requests = [url for url in opened.requests if url != path.as_uri() and not url.startswith("data:")]
        return opened

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three seeds, with all baselines, honesty checks and an untrusted name."""
    folder = tmp_path_factory.mktemp("page")
    names = (f"seed-{STRANGE}", "seed-1", "seed-2")
    runs = [write_run(folder / name, seed) for seed, name in enumerate(names)]
    for run in runs:
        write_history(run)
    check = {"name": "more steps", "verdict": "pass", "figure": "0.3 points", "meaning": "PGD-100 helps little. " * 9}
    path = runs[0] / "keep-0.01" / "finetune" / "honesty.json"
    path.write_text(
        json.dumps({"model_sha256": "keep-0.01/finetune-0", "checks": [check, check | {"verdict": "warn"}]})
    )
    results = read_runs(runs)
    write_page(results, compare_all(results), {}, read_class_results(results), folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_no_errors_no_requests_and_no_overflow(open_page: Open, page: Path, width: int, dark: bool) -> None:
    opened = open_page(page, width=width, dark=dark)
    assert (opened.requests, opened.complaints) == ([], [])
    assert opened.value_of("document.scripts.length") == 0
    assert opened.value_of("document.title").startswith("seed-")
    assert opened.value_of("document.querySelectorAll('section').length") == 8
    assert opened.value_of("innerWidth") == width
    assert opened.value_of("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('figure, svg, h1, p, dl, .scroll, pre')].filter("
    outside += "(e) => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"
    assert opened.value_of(outside) == 0
    clipped = """[...document.querySelectorAll("svg text")].filter((t) => t.checkVisibility()).filter((t) => {
        const [text, all] = [t.getBoundingClientRect(), t.closest("svg").getBoundingClientRect()];
        return text.left < all.left || text.right > all.right || text.top < all.top || text.bottom > all.bottom;
    }).map((t) => t.textContent)"""
    assert opened.value_of(clipped) == []
    scrolls = "[...document.querySelectorAll('.scroll')].some((e) => e.scrollWidth > e.clientWidth)"
    assert opened.value_of(scrolls) is (width == 360), "wide tables scroll by themselves"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_is_sufficient(open_page: Open, page: Path, dark: bool) -> None:
    opened = open_page(page, dark=dark)
    least = opened.value_of(CONTRAST)
    assert (least["background"] < 0.05) is dark
    assert least["text"] >= 4.5
    assert least["ticks"] >= 4.5
    assert least["drawn"] >= 3


def test_on_a_phone_results_and_outcomes_are_on_the_screen(open_page: Open, page: Path) -> None:
    """Without scrolling a table sideways: the robust column, outcomes, statuses."""
    opened = open_page(page, width=390)
    right_edges = """(selector, column) => [...document.querySelectorAll(selector)].flatMap((table) =>
        [...table.rows].map((row) => row.cells[column]).filter(Boolean)).map((e) => e.getBoundingClientRect().right)"""
    for table, column in (("accuracies", 3), ("means", 3), ("differences", 2)):
        edges = opened.page.evaluate(f"([s, c]) => ({right_edges})(s, c)", [f"table[aria-labelledby={table}]", column])
        assert len(edges) > 5
        assert max(edges) <= 390 - 16, table
    opened.page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    for table in ("Checks that warn", "Checks that pass", "Classes, HYDRA, 99 % pruned"):
        element = f"document.querySelector('[aria-label=\"{table}\"].scroll')"
        assert opened.value_of(f"{element}.scrollWidth <= {element}.clientWidth"), table
    tags = "[...document.querySelectorAll('.tag')].map((e) => e.getBoundingClientRect().right)"
    assert max(opened.value_of(tags)) <= 390 - 16


def test_passed_checks_are_folded_and_warnings_are_not(open_page: Open, page: Path) -> None:
    opened = open_page(page)
    seen = "[...document.querySelectorAll('#honesty .tag')].map((e) => [e.textContent, e.checkVisibility()])"
    assert opened.value_of(seen) == [["warn", True], ["pass", False]]
    opened.page.get_by_text("1 checks pass").click()
    assert opened.value_of(seen) == [["warn", True], ["pass", True]]


def test_numbers_in_charts_are_legible_on_a_phone(open_page: Open, page: Path) -> None:
    opened = open_page(page, width=360)
    heights = "[...document.querySelectorAll('svg text')].filter((e) => e.textContent && e.checkVisibility())"
    heights += ".map((e) => e.getBoundingClientRect().height)"
    assert min(opened.value_of(heights)) >= 10


def test_print_is_complete(open_page: Open, page: Path) -> None:
    opened = open_page(page, width=794, dark=True, media="print")
    assert opened.value_of(CONTRAST)["background"] == pytest.approx(1)
    folded = "[...document.querySelectorAll('details:not([open]) pre, details:not([open]) .chart')]"
    assert opened.value_of(f"{folded}.length") > 3
    assert opened.value_of(f"{folded}.every((e) => e.getBoundingClientRect().height > 20 && e.checkVisibility())")
    assert opened.value_of("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_faults_of_a_page_are_detected(open_page: Open, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("""<!DOCTYPE html><html><body><div style="width: 500px">wide</div>
        <img src="https://pictures.invalid/a.png"><script>console.error("boom"); nowhere();</script></body></html>""")
    opened = open_page(bad, width=360)
    assert opened.requests == ["https://pictures.invalid/a.png"]
    assert any("boom" in text for text in opened.complaints)
    assert any("nowhere" in text for text in opened.complaints)
    assert opened.value_of("document.documentElement.scrollWidth") > 360
