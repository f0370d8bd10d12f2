"""The page is self-contained, runs nothing, and shows strangers' names as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compressor.report.html import LINKS, TITLES, render_html, write_html
from compressor.report.model import Report, WeightFacts
from compressor.report.words import visible
from tests.report.full import full_report, hostile_full_report
from tests.report.sample import ATTACK, hostile_report, sample_report

# fmt: off
ALLOWED_TAGS = frozenset([
    "html", "head", "meta", "title", "style", "body", "main", "header", "nav", "section", "h1", "h2", "h3",
    "p", "strong", "span", "svg", "rect", "ul", "li", "div", "table", "caption", "thead", "tbody", "tr", "th",
    "td", "pre", "dl", "dt", "dd", "a", "details", "summary", "figure", "figcaption",
    # of matplotlib's drawings
    "g", "defs", "path", "use", "text", "tspan", "clippath",
])
# fmt: on
# fmt: off
ALLOWED_ATTRIBUTES = frozenset([
    "lang", "charset", "http-equiv", "content", "name", "class", "viewbox", "preserveaspectratio", "id",
    "role", "aria-label", "aria-labelledby", "aria-hidden", "x", "y", "width", "height", "scope", "data-head",
    "href", "fill-opacity", "text-anchor",
    # of matplotlib's drawings
    "style", "d", "transform", "clip-path", "xlink:href", "xmlns", "xmlns:xlink", "version",
])
# fmt: on
STYLE = re.compile(r"[a-z-]+: [-a-z0-9#., ()]*(; [a-z-]+: [-a-z0-9#., ()]*)*;?")
VOID_TAGS = {"meta"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "report",
    [
        sample_report(),
        sample_report(passed=False),
        sample_report(quality=False),
        hostile_report(),
        full_report(),
        hostile_full_report(),
    ],
    ids=["sample", "failed", "unmeasured", "hostile", "full", "hostile full"],
)
def test_page_holds_only_harmless_markup(report: Report) -> None:
    """No script, image, event handler, foreign address or odd style, whatever the names are."""
    text = render_html(report)
    page = Page(text)
    assert page.tags <= ALLOWED_TAGS
    assert {name for name, _ in page.attributes} <= ALLOWED_ATTRIBUTES
    links = {value for name, value in page.attributes if name == "href"}
    assert {link for link in links if not link.startswith("#")} == {
        LINKS["vLLM"],
        LINKS["compressed-tensors"],
    }
    assert {link[1:] for link in links if link.startswith("#")} <= set(TITLES)
    assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert all(link.startswith("https://") for link in LINKS.values())
    for name, value in page.attributes:
        assert name != "style" or STYLE.fullmatch(value), value
        assert name != "clip-path" or re.fullmatch(r"url\(#p[0-9a-f]+\)", value)
    # Comments and other declarations, which the parser passes over.
    assert text.count("<!") == 1
    assert "]]>" not in text
    assert len(text) < 3_000_000


def test_sections_appear_where_there_is_data() -> None:
    """And the list of contents names just those."""
    few, all_of_them = (
        re.findall(r'<section id="(\w+)"', render_html(report)) for report in (sample_report(), full_report())
    )
    assert all_of_them == list(TITLES)
    assert few == [
        *("size", "quality", "layers", "calibration", "cost", "serve", "verified", "made"),
    ]
    bare = sample_report().model_copy(update={"calibration": None, "weights": WeightFacts(relative_error={})})
    text = render_html(bare)
    for absent in ("layers", "calibration"):
        assert f'id="{absent}"' not in text
        assert f'href="#{absent}"' not in text


def test_the_same_report_gives_the_same_page() -> None:
    """Byte for byte, drawings included."""
    assert render_html(full_report()) == render_html(full_report())


def test_page_links_the_dialect() -> None:
    """To the project that defines how these weights are stored."""
    report = sample_report()
    result = report.result.model_copy(update={"format": "modelopt"})
    page = render_html(report.model_copy(update={"result": result}))
    assert f'<a href="{LINKS["modelopt"]}">modelopt</a>' in page
    assert LINKS["compressed-tensors"] not in page


def test_hostile_names_are_shown_in_full() -> None:
    """Escaping loses nothing: the command, which is never shortened, reads as it is."""
    page = Page(render_html(hostile_report()))
    assert visible(ATTACK) in page.text
    assert "{{ 7*7 }}" in page.text


def test_page_forbids_itself_everything_but_its_style() -> None:
    """A second wall behind the escaping: no script and no request even if a name got through."""
    page = render_html(sample_report())
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_page_says_what_the_report_says() -> None:
    """Headline, figures, caption with the source's note, serve line."""
    text = Page(render_html(sample_report())).text
    for expected in (
        "2.31x smaller (269.0 MB → 116.4 MB), perplexity +20.1% (22.32 → 26.81)",
        "Source: dequantized from GGUF Q4_1.",
        "106,168,320",
        "+20.1% (95%: +18.1% to +22.1%)",
        "vllm serve out/smollm2-nvfp4",
        "model.layers.0.self_attn.q_proj.weight",
        "quantized codes 53.1 MB (45.6%)",
    ):
        assert expected in text


def test_bars_share_one_scale() -> None:
    """The source fills the width; the result's rectangles follow each other and stop at its share."""
    report = sample_report()
    attributes = Page(render_html(report)).attributes
    xs = [float(value) for name, value in attributes if name == "x"]
    widths = [
        float(value) for name, value in attributes if name == "width" and value.replace(".", "").isdigit()
    ]
    before, after = slice(1, 3), slice(4, 7)  # the first of each bar is its track
    assert sum(widths[before]) == pytest.approx(1000, abs=0.02)
    assert sum(widths[after]) == pytest.approx(1000 * report.result.bytes / report.source.bytes, abs=0.02)
    assert xs[5] == pytest.approx(widths[4], abs=0.02)
    assert xs[6] == pytest.approx(widths[4] + widths[5], abs=0.02)


def test_written_page(tmp_path: Path) -> None:
    """report.html in UTF-8, and nothing else."""
    write_html(tmp_path, sample_report())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == render_html(sample_report()).encode()
