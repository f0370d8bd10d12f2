"""The script that fits plans and measures them, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.checkpoint.folder import FolderSource
from compressor.progress import Silent
from scripts.kv_plans import fit_plans, measure_plans
from tests.tiny import tiny_llama


def test_fitted_plans_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder for each wish; a row for each plan, the first compared with itself."""
    source = FolderSource(tiny_llama(tmp_path / "model", layers=6))
    wishes = ["research:auto:240", "own:auto:400"]
    fit_plans(source, tmp_path, wishes, sequences=6, context=64, sink=1, progress=Silent())
    text = tmp_path / "text.txt"
    text.write_text("A sentence about nothing in particular. " * 20)
    plans = ["turboquant_4bit_nc", str(tmp_path / "research-240"), str(tmp_path / "own-400"), "bf16"]
    capsys.readouterr()
    measure_plans(source, [text], plans, tokens=256, context=64)
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == plans
    # Two layers of six packed: 2 heads x 22 bytes, else 2 x 64.
    assert rows[0][1] == str(2 * 2 * 22 + 4 * 2 * 64)
    assert rows[1][1] == "240"
    assert rows[0][5] == "0 [0, 0]"
    assert float(rows[3][4]) < 1e-4 < float(rows[1][4])
    assert float(rows[3][6].split()[0]) > 95
