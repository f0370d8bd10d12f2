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


def test_rows_say_which_engine_and_device() -> None:
    """A verdict without a version is worth nothing."""
    for rows in measured().values():
        for row in rows:
            assert row["refused"] or (row["engine"]["version"] and row["engine"]["device"]), row["cell"]
