"""The texts in calibration/: what is held out is held out."""

from __future__ import annotations

import json
from pathlib import Path

from compressor.data import shipped_root

FOLDER = shipped_root() / "calibration"


def _documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_held_out_and_calibration_text_share_nothing() -> None:
    """No document of one is in the other, and no long run of words."""
    held, seen = (_documents(FOLDER / f"{name}.jsonl") for name in ("heldout", "calibration"))
    assert not {document["id"] for document in held} & {document["id"] for document in seen}
    runs = []
    for documents in (held, seen):
        words = [document["text"].split() for document in documents]
        runs.append({tuple(text[i : i + 12]) for text in words for i in range(len(text) - 11)})
    assert not runs[0] & runs[1]
    assert min(len(run) for run in runs) > 50_000


def test_every_file_has_its_licence_told() -> None:
    """README.md names every text, and the notices lie beside them."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("heldout.jsonl", "calibration.jsonl", "piqa/", "LICENSE-PSF-2.0.txt", "piqa/NOTICE"):
        assert f"`{name}`" in readme
        assert (FOLDER / name).exists()
    assert "Academic Free License version 3.0" in (FOLDER / "piqa" / "NOTICE").read_text()


def test_piqa_items_are_whole() -> None:
    """1,500 items with two choices each and a right one among them."""
    items = _documents(FOLDER / "piqa" / "piqa.jsonl")
    assert len(items) == 1500
    assert all(len(item["choices"]) == 2 and item["gold"] in (0, 1) for item in items)
