"""Long context in the report: rows, drawings, and every view that shows them."""

from __future__ import annotations

import math
from io import StringIO
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from compressor.report.card import render_card
from compressor.report.html import render_html
from compressor.report.long import (
    LongFacts,
    found_rows,
    kilo,
    long_caption,
    long_facts,
    long_rows,
    ruler_rows,
)
from compressor.report.long_plot import found_svg, nll_svg
from compressor.report.model import Report
from compressor.report.terminal import print_report, report_console
from tests.report.sample import RECIPE, sample_report

SVG = "{http://www.w3.org/2000/svg}"
EDGES = (0, 1024, 4096, 8192, 16384, 32768)
DEPTHS = (0.0, 0.5, 1.0)


def measured(**changed: Any) -> dict[str, Any]:
    """As ``LongResult.to_json`` has it."""
    positions = list(range(256, 32768, 512))
    nll = {
        "source": [3.0 if position < 8192 else 3 + position / 4096 for position in positions],
        "sliding": [3.0] * len(positions),
        "result": [3.02] * len(positions),
    }
    buckets = [
        {
            "start": start,
            "stop": stop,
            "nll": {"source": 3.0, "sliding": 3.0, "result": 3.02},
            "change": {
                "source": {"mean": 0.0, "ci95": [0.0, 0.0]},
                "result": {"mean": 0.02, "ci95": [0.01, 0.03]},
            },
        }
        for start, stop in pairwise(EDGES)
    ]
    needles = {
        name: [
            {
                "kind": "passkey",
                "tokens": tokens,
                "depth": depth,
                "trials": 4,
                "found": found,
                "logprob": -1.0,
            }
            for tokens in (8192, 32768)
            for depth in DEPTHS
        ]
        for name, found in (("source", 0), ("result", 3))
    }
    ruler = {
        name: [{"task": "ruler_vt", "tokens": 32768, "samples": 20, "score": score}]
        for name, score in (("source", 0.125), ("result", 0.5))
    }
    text = {
        "documents": ["a", "b"],
        "tokens": 32768,
        "reference": "sliding",
        "window": 8192,
        "stride": 1024,
        "dtype": "bfloat16",
        "buckets": buckets,
        "curve": {"position": positions, "nll": nll},
    }
    return {"text": text, "needles": needles, "ruler": ruler, "documents_label": "long.jsonl.xz"} | changed


def _report(**changed: Any) -> Report:
    return sample_report().model_copy(update={"long": long_facts(measured(**changed))})


def test_rows_say_what_was_measured() -> None:
    """In words of kilotokens; by depth for the result."""
    facts = long_facts(measured())
    assert facts.text is not None
    rows = long_rows(facts.text)
    assert rows[0] == ("0 to 1K", "3.000", "3.000", "3.020", "+0.020", "+0.010 to +0.030")
    assert [row[0] for row in rows[1:]] == ["1K to 4K", "4K to 8K", "8K to 16K", "16K to 32K"]
    assert found_rows(facts)[1] == (
        "passkey",
        "32,768",
        "0 of 12",
        "9 of 12",
        "0: 3/4, 0.5: 3/4, 1: 3/4",
    )
    assert ruler_rows(facts) == [("ruler_vt", "32,768", "12.5%", "50.0%", "20")]
    assert "each token past the first window sees 7,168 to 8,191 tokens before it" in long_caption(facts)
    assert "The reference is the sliding window." in long_caption(facts)
    assert "Depth 0 is the beginning" in long_caption(facts)
    assert "Depth" not in long_caption(long_facts(measured(needles={})))
    assert [kilo(tokens) for tokens in (0, 1000, 1024, 131072)] == ["0", "1,000", "1K", "128K"]


def test_within_the_trained_length_there_is_no_window() -> None:
    """Its column has hyphens; one document has no interval."""
    told = measured()["text"]
    for bucket in told["buckets"]:
        del bucket["nll"]["sliding"]
        bucket["change"] = {"result": {"mean": -0.001, "ci95": None}}
    told["curve"]["nll"].pop("sliding")
    told |= {"reference": "source", "window": None, "stride": None, "documents": ["a"]}
    facts = long_facts(measured(text=told))
    assert facts.text is not None
    assert long_rows(facts.text)[0] == ("0 to 1K", "3.000", "-", "3.020", "-0.001", "-")
    assert "Sliding" not in long_caption(facts)
    assert "of 1 document of 32,768 tokens (" in long_caption(facts)
    assert "The reference is the source." in long_caption(facts)
    assert "trained" not in nll_svg(facts)


def test_every_view_shows_it() -> None:
    """Terminal, page and card; the stored report is read again."""
    report = _report()
    out = StringIO()
    print_report(report, report_console(out, 120))
    page, card = render_html(report), render_card(report, RECIPE)
    for shown in (out.getvalue(), page, card):
        assert "Long context" in shown
        for word in ("16K to 32K", "3.020", "ruler_vt", "9 of 12", "7,168 to 8,191"):
            # The card writes underscores with a backslash.
            assert word in shown.replace("\\", ""), word
    assert page.count("<svg") == render_html(sample_report()).count("<svg") + 2
    assert "longer contexts were not" not in card
    assert "longer contexts were not" in render_card(sample_report(), RECIPE)
    assert Report.from_json(report.to_json()) == report
    assert "Long context" not in render_html(sample_report())


def _axis(drawn: ElementTree.Element, gid: str) -> list[tuple[float, float]]:
    """The points of a line."""
    (group,) = [group for group in drawn.iter(f"{SVG}g") if group.get("id") == gid]
    words = next(group.iter(f"{SVG}path")).get("d", "").replace("M", "").replace("L", "").split()
    numbers = [float(word) for word in words]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_lines_lie_where_their_numbers_say() -> None:
    """Higher is worse; the source leaves the frame, and the others stay apart in it."""
    text = nll_svg(long_facts(measured()))
    assert text == nll_svg(long_facts(measured()))
    drawn = ElementTree.fromstring(text)
    width, height = map(float, drawn.get("viewBox", "").split()[2:])
    # Text is drawn at 8 to 10 points: on a phone's 360 pixels it stays readable.
    assert width <= 360
    result, sliding, source = (_axis(drawn, f"nll-{name}") for name in ("result", "sliding", "source"))
    assert len(result) >= 2
    assert all(0 < x < width and 0 < y < height for x, y in (*result, *sliding))
    assert result[0][1] < sliding[0][1]
    assert min(y for _, y in source) < min(y for _, y in result)
    words = {word.text and word.text.strip() for word in drawn.iter(f"{SVG}text")}
    assert {"trained: 8K", "32K", "tokens before", "nats a token"} <= words


def test_tiles_hold_what_was_found() -> None:
    """One for each model, length and depth; few lengths leave room for the trials."""
    drawn = ElementTree.fromstring(found_svg(long_facts(measured()), "passkey"))
    words = [word.text for word in drawn.iter(f"{SVG}text")]
    assert words.count("0/4") == words.count("3/4") == 6
    assert {"passkey, source", "passkey, result", "8K", "32K", "0.5"} <= set(words)
    many = measured()
    many["needles"] = {
        "result": [
            cell | {"tokens": tokens}
            for tokens in range(1024, 9216, 1024)
            for cell in [many["needles"]["result"][0]]
        ]
    }
    words = [
        word.text
        for word in ElementTree.fromstring(found_svg(long_facts(many), "passkey")).iter(f"{SVG}text")
    ]
    assert words.count("3") == 8
    assert found_svg(long_facts(measured()), "needle") == ""


def test_figures_that_are_no_numbers_are_drawn_around() -> None:
    """A perplexity beyond all bounds is still a report."""
    told = measured()
    told["text"]["buckets"][0]["nll"]["source"] = math.inf
    told["text"]["curve"]["nll"]["source"][3] = math.inf
    facts = long_facts(told)
    assert long_rows(_text(facts))[0][1] == "infinite"
    assert ElementTree.fromstring(nll_svg(facts)).tag == f"{SVG}svg"
    told["text"]["curve"]["nll"] = {"result": [math.nan] * len(told["text"]["curve"]["position"])}
    assert nll_svg(long_facts(told)) == ""


def test_a_strangers_report_is_read_as_it_must_be() -> None:
    """Its words and sizes are drawn: only ours are."""
    cell = measured()["needles"]["result"][0]
    curve = measured()["text"]["curve"]
    for changed in (
        {"needles": {"result": [cell | {"kind": "$x$"}]}},
        {"needles": {"result": [cell | {"trials": 0}]}},
        {"needles": {"$x$": [cell]}},
        {"text": measured()["text"] | {"curve": curve | {"position": [1, 2]}}},
        {"text": measured()["text"] | {"curve": curve | {"nll": {"$x$": curve["nll"]["result"]}}}},
    ):
        with pytest.raises(ValidationError):
            long_facts(measured(**changed))


def _text(facts: LongFacts) -> Any:
    assert facts.text is not None
    return facts.text


@pytest.mark.parametrize("width", [60, 80])
def test_narrow_terminals(width: int) -> None:
    """No line is wider, but the command; no number is cut."""
    out = StringIO()
    print_report(_report(), report_console(out, width))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines if "vllm serve" not in line)
    words = out.getvalue().split()
    assert {"+0.020", "+0.010", "+0.030"} <= set(words)
