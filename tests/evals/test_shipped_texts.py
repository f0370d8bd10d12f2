"""The texts in calibration/: what is held out is held out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from compressor.data import shipped_root

FOLDER = shipped_root() / "calibration"


CALIBRATION = ("prose", "code", "chat")


def _documents(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _runs(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Every run of 12 words."""
    words = [text.split() for text in texts]
    return {tuple(text[i : i + 12]) for text in words for i in range(len(text) - 11)}


@pytest.mark.parametrize("name", CALIBRATION)
def test_held_out_and_calibration_text_share_nothing(name: str) -> None:
    """No document of one is in the other, and no long run of words."""
    held, seen = _documents(FOLDER / "heldout.jsonl"), _documents(FOLDER / f"{name}.jsonl")
    assert not {document["id"] for document in held} & {document["id"] for document in seen}
    assert len({document["id"] for document in seen}) == len(seen)
    texts = [turn["content"] for document in seen for turn in document.get("messages", ())] or [
        document["text"] for document in seen
    ]
    runs = _runs(document["text"] for document in held), _runs(texts)
    assert not runs[0] & runs[1]
    assert min(len(run) for run in runs) > 50_000
    for task in ("piqa", "openbookqa"):
        items = _documents(FOLDER / task / f"{task}.jsonl")
        asked = _runs(f"{item['question']} {choice}" for item in items for choice in item["choices"])
        assert asked
        assert not runs[1] & asked


def test_conversations_are_conversations() -> None:
    """User and assistant by turns, nobody silent: every chat template takes them."""
    for document in _documents(FOLDER / "chat.jsonl"):
        turns = document["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(turn["content"].strip() for turn in turns)


def test_every_file_has_its_licence_told() -> None:
    """README.md names every text, and the notices lie beside them."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    texts = [path.name for path in FOLDER.glob("*.jsonl")]
    assert sorted(texts) == sorted(f"{name}.jsonl" for name in ("heldout", *CALIBRATION))
    for name in (*texts, "piqa/", "LICENSE-PSF-2.0.txt", "piqa/NOTICE", "openbookqa/", "openbookqa/NOTICE"):
        assert f"`{name}`" in readme
        assert (FOLDER / name).exists()
    assert "Academic Free License version 3.0" in (FOLDER / "piqa" / "NOTICE").read_text()


@pytest.mark.parametrize(("task", "count", "choices"), [("piqa", 1500, 2), ("openbookqa", 500, 4)])
def test_items_are_whole(task: str, count: int, choices: int) -> None:
    """So many items, each with so many choices and a right one among them."""
    items = _documents(FOLDER / task / f"{task}.jsonl")
    assert len(items) == count
    assert all(len(item["choices"]) == choices and item["gold"] in range(choices) for item in items)
