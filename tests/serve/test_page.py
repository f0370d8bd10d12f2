"""docs/serving.md is what the script makes of the stored measurements: nothing in it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.serving_page import render

ROOT = Path(__file__).resolve().parents[2]


def measured() -> dict[str, list[dict[str, Any]]]:
    """The stored rows of each machine."""
    files = sorted((ROOT / "bench" / "results").glob("serving-*.json"))
    return {path.stem: json.loads(path.read_text())["rows"] for path in files}


def test_the_page_follows_from_the_measurements() -> None:
    """Rendered again from bench/results, it is the same."""
    assert render(measured()) == (ROOT / "docs" / "serving.md").read_text()


def test_dates_are_shown_where_rows_have_them() -> None:
    """Rows that are older say so; none gets a date that nobody wrote down."""
    row = {
        "cell": "a/int4",
        "family": "a",
        "format": "INT4",
        "refused": "no",
        "rounded": False,
        "engine": None,
    }
    assert "by date" not in render({"x": [row]})
    page = render({"x": [row, row | {"cell": "b/int4", "family": "b", "date": "2026-01-02"}]})
    assert "Cells by date: 2026-01-02 (1), not recorded (1)." in page


def test_rounded_cells_are_told_by_their_field() -> None:
    """Whatever the reason's words are."""
    [row] = [row for row in measured()["serving-gpu"] if row["cell"] == "llama/fp8_dynamic"]
    assert row["rounded"]
    changed = row | {"engine": row["engine"] | {"reason": "other words"}}
    assert "rounded**" in render({"x": [changed]}).partition("## ")[2]
    assert "rounded**" not in render({"x": [changed | {"rounded": False}]}).partition("## ")[2]


def test_rows_say_which_engine_and_device() -> None:
    """A verdict without a version is worth nothing."""
    for rows in measured().values():
        for row in rows:
            assert row["refused"] or (row["engine"]["version"] and row["engine"]["device"]), row["cell"]
