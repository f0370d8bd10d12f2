"""Pages in a real browser: at phone, tablet and desktop width, light, dark and printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.report.html import render_html
from compressor.report.side_by_side import Run, side_by_side
from compressor.report.side_by_side_html import render_side_by_side
from tests.report.browser import Tab, browser_tab, find_browser
from tests.report.full import full_report, hostile_full_report
from tests.report.sample import ATTACK, hostile_report, sample_report

pytestmark = pytest.mark.browser
PROGRAM = find_browser()
WIDTHS = {"phone": 360, "tablet": 768, "desktop": 1280}
# Where pictures are kept to be looked at; the test's own folder otherwise.
PICTURES = os.environ.get("COMPRESS_SCREENSHOTS")

# Elements that reach beyond the right edge; those of a drawing are scaled with it.
OVERFLOWING = """[...document.body.querySelectorAll("*")].filter(e => {
  if (e.closest("svg") && !e.matches("svg")) return false;
  const box = e.getBoundingClientRect();
  return box.width && box.right > document.documentElement.clientWidth + 1;
}).map(e => e.outerHTML.slice(0, 120))"""
# Cells so narrow that their words become columns of letters.
SQUEEZED = """[...document.querySelectorAll("td, th")].filter(e => {
  const box = e.getBoundingClientRect();
  return e.textContent.trim().length > 3 && box.height > 12 * Math.max(box.width, 1);
}).map(e => e.outerHTML.slice(0, 120))"""
# What names cannot do: every element that could run, load or lead away.
DANGEROUS = """document.querySelectorAll(
  "script, img, iframe, object, embed, link, base, form, input, video, audio, foreignObject"
).length + [...document.querySelectorAll("*")].filter(
  e => [...e.attributes].some(
    a => a.name.startsWith("on") || a.name.endsWith("href") && !/^(#|https:)/.test(a.value))
).length"""
# Darkest and brightest text against its own background, by WCAG's contrast.
FAINT = """[...document.querySelectorAll("main *")].filter(e =>
  [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) && !e.closest("svg, .hidden")
).filter(e => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  let behind = e;
  while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const colours = [getComputedStyle(e).color, getComputedStyle(behind || document.body).backgroundColor];
  const pair = colours.map(colour => light(rgb(colour)));
  return (Math.max(...pair) + .05) / (Math.min(...pair) + .05) < 4.5;
}).map(e => e.outerHTML.slice(0, 120))"""


def _side_by_side() -> str:
    report = full_report()
    runs = [Run(name, None, report) for name in ("one", "another", ATTACK)]
    return render_side_by_side(runs, side_by_side(runs))


PAGES = {
    "sample": lambda: render_html(sample_report()),
    "hostile": lambda: render_html(hostile_report()),
    "full": lambda: render_html(full_report()),
    "hostile-full": lambda: render_html(hostile_full_report()),
    "side-by-side": _side_by_side,
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of one browser for all tests."""
    if PROGRAM is None:
        pytest.skip("no browser: bash scripts/browser_env.sh unpacks one, or name one in CHROMIUM")
    with browser_tab(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page as a file, named as it is called here."""
    file = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    file.write_text(PAGES[request.param]())
    return file


def picture(page: Path, name: str) -> Path:
    """Where a picture of a page goes."""
    folder = Path(PICTURES) if PICTURES else page.parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{page.stem}-{name}"


@pytest.mark.parametrize(
    "device, dark",
    [("phone", False), ("phone", True), ("tablet", False), ("desktop", False), ("desktop", True)],
)
def test_fits_asks_for_nothing_and_complains_of_nothing(
    tab: Tab, page: Path, device: str, dark: bool
) -> None:
    """Offline: one request, the page itself; all within the width, readable; a silent console."""
    tab.open(page, width=WIDTHS[device], height=800, dark=dark)
    file = picture(page, f"{device}-{'dark' if dark else 'light'}.png")
    tab.screenshot(file)
    assert tab.requests == [page.as_uri()]
    assert tab.complaints == []
    assert tab.value("document.documentElement.scrollWidth") == WIDTHS[device]
    assert tab.value(OVERFLOWING) == []
    assert tab.value(FAINT) == []
    assert tab.value(DANGEROUS) == 0
    if "hostile" not in page.stem:
        assert tab.value(SQUEEZED) == []
    assert file.stat().st_size > 10_000
    assert page.stat().st_size < 3_000_000


def test_drawings_and_tables_have_names(tab: Tab, page: Path) -> None:
    """For people who do not see them; links within the page lead somewhere."""
    tab.open(page, width=1280, height=800)
    unnamed = """[...document.querySelectorAll("svg:not([aria-hidden])")].filter(
      e => e.getAttribute("role") != "img" || !e.getAttribute("aria-label")).length"""
    assert tab.value(unnamed) == 0
    assert tab.value("""[...document.querySelectorAll("table")].filter(t => !t.caption).length""") == 0
    assert (
        tab.value("""[...document.querySelectorAll("nav a")].filter(a => !document.querySelector(
      a.getAttribute("href"))).length""")
        == 0
    )
    twice = """(ids => ids.filter((id, i) => ids.indexOf(id) != i))(
      [...document.querySelectorAll("[id]")].map(e => e.id))"""
    assert tab.value(twice) == []


def test_printed(tab: Tab, page: Path) -> None:
    """Some pages, black on white whatever the screen is, with what is folded away on the screen."""
    tab.open(page, width=1280, height=800, dark=True)
    tab.pdf(file := picture(page, "printed.pdf"))
    assert file.read_bytes().startswith(b"%PDF-")
    tab.ask("Emulation.setEmulatedMedia", media="print")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert (
        tab.value("""[...document.querySelectorAll("details > :not(summary)")].filter(
      e => e.getBoundingClientRect().height == 0).length""")
        == 0
    )
    assert tab.complaints == []
    tab.ask("Emulation.setEmulatedMedia", media="")
