"""Numbers as people read them, and names made safe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.report.words import duration, number, percent, short_name, size, visible


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (70_300, "70.3 kB"),
        (100_000, "0.1 MB"),
        (116_451_048, "116.5 MB"),
        (1_904_000_000, "1.90 GB"),
        (42_700_000_000, "42.7 GB"),
    ],
)
def test_size(nbytes: int, text: str) -> None:
    """Decimal units throughout."""
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (14.2, "14.2 s"),
        (171.4, "2 min 51 s"),
        (7_500.0, "2 h 05 min"),
        (float("nan"), "not a number s"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    """Seconds, then minutes, then hours."""
    assert duration(seconds) == text


def test_percent_and_number_of_broken_measurements() -> None:
    """A broken model has an infinite perplexity; it is said in words."""
    assert percent(0.2012, signed=True) == "+20.1%"
    assert percent(-0.001, signed=True) == "-0.1%"
    assert percent(float("inf"), signed=True) == "infinite"
    assert number(float("nan"), 2) == "not a number"
    assert number(12345.678, 2) == "12,345.68"


def test_visible_writes_out_what_would_act_or_hide() -> None:
    """Terminal escapes, direction overrides, line separators, odd spaces and stray bytes become text."""
    assert visible("a\x1b[31m\u202eb\u2028c\u00a0d\udc80\n") == "a\\x1b[31m\\u202eb\\u2028c\\xa0d\\udc80\\n"
    assert visible("Gewöhnlich 模型") == "Gewöhnlich 模型"


@given(st.text(st.characters()))
def test_short_names_are_printable_and_short(text: str) -> None:
    """Whatever the name, surrogates included."""
    shown = short_name(text)
    assert shown.isprintable()
    assert len(shown) <= 200
    if len(visible(text)) <= 200:
        assert shown == visible(text)
