"""Gives lm-eval the PIQA items that lie beside this file, so that the task needs no network."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset


def load(**metadata: object) -> dict[str, Dataset]:
    """The ``validation`` split, its columns named as on the Hub; lm-eval passes the task's metadata."""
    lines = (Path(__file__).parent / "piqa.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    rows = [
        {
            "goal": item["question"],
            "sol1": item["choices"][0],
            "sol2": item["choices"][1],
            "label": item["gold"],
        }
        for item in items
    ]
    return {"validation": Dataset.from_list(rows)}
