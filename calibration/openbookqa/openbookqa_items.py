"""Gives lm-eval the OpenBookQA items that lie beside this file, so that the task needs no network."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

_LABELS = "ABCD"


def load(**metadata: object) -> dict[str, Dataset]:
    """The ``test`` split, its columns named as on the Hub; lm-eval passes the task's metadata."""
    lines = (Path(__file__).parent / "openbookqa.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    rows = [
        {
            "question_stem": item["question"],
            "choices": {"text": item["choices"], "label": list(_LABELS)},
            "answerKey": _LABELS[item["gold"]],
        }
        for item in items
    ]
    return {"test": Dataset.from_list(rows)}
