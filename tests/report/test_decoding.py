"""Decoding with proposed tokens in words."""

from __future__ import annotations

from io import StringIO

import pytest

from compressor.evals.decode_record import (
    Acceptance,
    DecodingResult,
    Divergence,
    DomainFigures,
    DraftFigures,
)
from compressor.report.decoding import DECODING_HEADS, decoding_notes, decoding_rows
from compressor.report.terminal import print_decoding, report_console


def test_rows_say_what_was_measured() -> None:
    """Texts that differ, and how near the tie; what was left out."""
    near = Divergence(0, 5, -0.125)
    drafts = (
        DraftFigures("eagle3", Acceptance.of([3, 1, 0, 1], 2), 0, (near,), 1.5, 1.62, tokens=40, passes=30),
        DraftFigures("last token", Acceptance.of([0], 2), 0, (), 2.0, 0.9, tokens=40, passes=30),
    )
    result = DecodingResult(
        tokens=2,
        new_tokens=20,
        temperature=0.0,
        runs=3,
        dtype="bfloat16",
        device="a machine",
        rounded=False,
        domains=(DomainFigures("code", 1, 2, 1, 2.5, drafts), DomainFigures("chat", 8, 0, 3, 0.0, ())),
    )
    rows = decoding_rows(result.to_json())
    assert {len(row) for row in rows} == {len(DECODING_HEADS)}
    assert rows[0] == ("code", "1", "eagle3", "2.00", "75% 25%", "1.62x", "1 of 2")
    assert rows[1][-2:] == ("0.90x", "2 of 2")
    assert rows[2] == ("chat", "8", "-", "-", "-", "-", "-")
    notes = decoding_notes(result.to_json())
    assert "greedy, bfloat16, a machine" in notes[0]
    assert notes[1] == "4 continuations that run in circles are left out."
    assert notes[2].startswith("1 continuation differs")
    assert notes[2].endswith("0.125 apart.")
    sampled = DecodingResult(2, 20, 0.8, 3, "float32", "a machine", False, ())
    assert "sampled at 0.8" in decoding_notes(sampled.to_json())[0]


@pytest.mark.parametrize("width", [60, 70, 80, 120])
def test_no_number_is_cut(width: int) -> None:
    """Wide rates beside long names; where the last column has no room, a note says what it would."""
    drafts = [
        DraftFigures(name, Acceptance(16, (16, 16, 16)), 0, (), 2.0, 10.45, 60, 40)
        for name in ("draft_model", "last token")
    ]
    domains = (DomainFigures("prose", 16, 16, 0, 2.5, tuple(drafts)),)
    result = DecodingResult(3, 20, 0.0, 3, "float32", "a machine", False, domains)
    file = StringIO()
    print_decoding(result.to_json(), report_console(file, width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert text.count("100%") == 6
    assert text.count("10.45x") == 2
    assert "All continuations are plain decoding's" in " ".join(text.split())
    assert ("16 of" in text) == (width >= 80)
