"""The report's page as a browser shows it: silent, self-contained, within its window, legible in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.report.page import write_page
from pipeline.report.results import compare_all, read_runs
from tests.support.browser import UBUNTU, Browser, find_program
from tests.unit.report.test_page import STRANGE, write_history
from tests.unit.report.test_report import write_run

pytestmark = pytest.mark.skipif(
    UBUNTU and find_program() is None, reason="Ubuntu has no package of Chromium (only a snap); install google-chrome"
)
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
          drawn: least(".line, .interval", "stroke"), ticks: least("svg text", "fill"),
          background: light(behind(document.body))};
})()
"""
"""The least contrast of each kind, as WCAG 2 defines it, and how light the page is."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three seeds, with all baselines, checks and a name of a stranger."""
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
    found = read_runs(runs)
    write_page(found, compare_all(found), {}, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_is_silent_asks_for_nothing_and_fits(browser: Browser, page: Path, width: int, dark: bool) -> None:
    seen = browser.open(page, width=width, dark=dark)
    assert (seen.requests, seen.complaints) == ([], [])
    assert browser.value_of("document.title").startswith("seed-")
    assert browser.value_of("document.querySelectorAll('section').length") == 7
    assert browser.value_of("innerWidth") == width
    assert browser.value_of("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('figure, svg, h1, p, dl, .scroll, pre')].filter("
    outside += "(e) => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"
    assert browser.value_of(outside) == 0
    cut = """[...document.querySelectorAll("svg text")].filter((t) => t.checkVisibility()).filter((t) => {
        const [text, all] = [t.getBoundingClientRect(), t.closest("svg").getBoundingClientRect()];
        return text.left < all.left || text.right > all.right || text.top < all.top || text.bottom > all.bottom;
    }).map((t) => t.textContent)"""
    assert browser.value_of(cut) == []
    scrolls = "[...document.querySelectorAll('.scroll')].some((e) => e.scrollWidth > e.clientWidth)"
    assert browser.value_of(scrolls) is (width == 360), "wide tables scroll by themselves"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_legible(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    least = browser.value_of(CONTRAST)
    assert (least["background"] < 0.05) is dark
    assert least["text"] >= 4.5
    assert least["ticks"] >= 4.5
    assert least["drawn"] >= 3


def test_numbers_in_drawings_can_be_read_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=360)
    heights = "[...document.querySelectorAll('svg text')].filter((e) => e.textContent && e.checkVisibility())"
    heights += ".map((e) => e.getBoundingClientRect().height)"
    assert min(browser.value_of(heights)) >= 10


def test_what_is_printed_is_whole(browser: Browser, page: Path) -> None:
    browser.open(page, width=794, dark=True, media="print")
    assert browser.value_of(CONTRAST)["background"] == pytest.approx(1)
    folded = "[...document.querySelectorAll('details:not([open]) pre, details:not([open]) .chart')]"
    assert browser.value_of(f"{folded}.length") > 3
    assert browser.value_of(f"{folded}.every((e) => e.getBoundingClientRect().height > 20 && e.checkVisibility())")
    assert browser.value_of("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_what_a_page_does_wrong_is_seen(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("""<!DOCTYPE html><html><body><div style="width: 500px">wide</div>
        <img src="https://pictures.invalid/a.png"><script>console.error("boom"); nowhere();</script></body></html>""")
    seen = browser.open(bad, width=360)
    assert seen.requests == ["https://pictures.invalid/a.png"]
    assert any("boom" in text for text in seen.complaints)
    assert any("nowhere" in text for text in seen.complaints)
    assert browser.value_of("document.documentElement.scrollWidth") > 360
