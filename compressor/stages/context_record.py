"""The scores of a search, kept so that a killed one goes on.

Legend: N documents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.stages.context_scores import Score
from compressor.workspace import write_json


class ScoreRecord:
    """Scores by what they are of, in a file that is written whole after each.

    Args:
        path: of the file; where it is another search's, or damaged, nothing in it is known.
        key: of the search.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._scores: dict[str, list[list[float]]] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == key:
                self._scores = {name: _pair(value) for name, value in found["scores"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._scores = {}

    def read(self, name: str) -> Score | None:
        """The score of that name, if it is known."""
        if name not in self._scores:
            return None
        long_N, short_N = self._scores[name]
        return Score(tuple(long_N), tuple(short_N))

    def add(self, name: str, score: Score) -> None:
        """Keeps it."""
        self._scores[name] = [list(score.long_N), list(score.short_N)]
        write_json(self._path, {"key": self._key, "scores": self._scores})


def _pair(value: Any) -> list[list[float]]:
    long_N, short_N = value
    return [[float(nats) for nats in long_N], [float(nats) for nats in short_N]]
