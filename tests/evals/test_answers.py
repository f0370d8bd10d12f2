"""Answers kept by content."""

from __future__ import annotations

import json
from pathlib import Path

from compressor.evals.answers import Answers


def test_the_same_is_computed_once(tmp_path: Path) -> None:
    """Other requests, kinds and models are computed; what comes back is what was computed, bit by bit."""
    computed: list[str] = []

    def ask(answers: Answers, kind: str, asked: object, value: float = 0.1 + 0.2) -> object:
        def compute() -> list[object]:
            computed.append(kind)
            return [(value, True), (-1.5, False)]

        return answers.kept(kind, asked, compute)

    one = Answers(tmp_path / "kept", {"source": "a"})
    first = ask(one, "x", [[1], [2]])
    assert ask(one, "x", [[1], [2]]) == first == [[0.1 + 0.2, True], [-1.5, False]]
    assert computed == ["x"]
    ask(one, "x", [[1], [3]])
    ask(one, "y", [[1], [2]])
    ask(Answers(tmp_path / "kept", {"source": "b"}), "x", [[1], [2]])
    assert computed == ["x", "x", "y", "x"]


def test_nan_and_broken_files_are_not_kept(tmp_path: Path) -> None:
    """NaN is computed again; what is no answer is written anew."""
    answers = Answers(tmp_path, {})
    answers.kept("x", 1, lambda: [(float("nan"), True)])
    assert list(tmp_path.iterdir()) == []
    answers.kept("x", 1, lambda: ["one"])
    (path,) = tmp_path.iterdir()
    for broken in ("{", "[]", json.dumps({"answer": 1})):
        path.write_text(broken)
        assert answers.kept("x", 1, lambda: ["two"]) == ["two"]
    assert answers.kept("x", 1, lambda: ["three"]) == ["two"]
