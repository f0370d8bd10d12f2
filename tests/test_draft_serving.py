"""What the script that times drafts in vLLM makes of answers; tests/serve has the real engine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from scripts import draft_serving
from scripts.benchmarks.process import Failed
from scripts.draft_serving import Cell, Server, cycled, render

STRAIGHT, OTHER, CIRCLE = list(range(16)), [*range(15), 99], [7] * 16


def test_answers_in_circles_are_no_acceptance() -> None:
    """One request at a time, each is counted by itself; speeds are of every round."""
    cell = Cell()
    answer = {"ids": [STRAIGHT, CIRCLE], "wall_s": 2.0, "counts": [[5, 4, 1], [3, 3, 3]]}
    cell.add(answer, [STRAIGHT, OTHER])
    cell.add(answer | {"wall_s": 4.0}, [STRAIGHT, OTHER])
    found = cell.to_json()
    assert found["speeds"] == [16.0, 8.0]
    assert (found["requests"], found["looping"], found["as_alone"]) == (2, 1, 1)
    assert found["acceptance"] == {"length": 2.0, "rates": [0.8, 0.2], "drafts": 5, "accepted_at": [4, 1]}


def test_answers_in_batches_are_counted_together() -> None:
    """Prompts come anew behind the last, and are compared with their own answers; plain has no acceptance."""
    assert cycled([[1], [2]], 5) == [[1], [2], [1], [2], [1]]
    drafted, plain = Cell(), Cell()
    answer = {"ids": [STRAIGHT, OTHER, STRAIGHT, STRAIGHT], "wall_s": 1.0, "counts": [[8, 4]]}
    drafted.add(answer, [STRAIGHT, OTHER])
    assert drafted.to_json()["as_alone"] == 3
    assert drafted.to_json()["acceptance"]["length"] == 1.5
    plain.add(answer | {"counts": [[0]]}, None)
    assert plain.to_json()["acceptance"] is None
    assert plain.to_json()["as_alone"] is None


def test_table() -> None:
    """Speeds are beside those of plain in the same cell."""
    cells = []
    for name, speed, counts in (("plain", 2.0, [[0]]), ("draft", 1.0, [[8, 4]])):
        cell = Cell()
        cell.add({"ids": [STRAIGHT], "wall_s": speed, "counts": counts}, [STRAIGHT])
        cells.append({"domain": "code", "concurrency": 1, "engine": name, **cell.to_json()})
    lines = render({"cells": cells}).splitlines()
    assert lines[2] == "| code | 1 | plain | 8 (8 to 8) | 1.00 |  |  | 1 of 1 |"
    assert lines[3] == "| code | 1 | draft | 16 (16 to 16) | 2.00 | 1.50 | 50% | 1 of 1 |"


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        ("import sys; print('[rank0]: ValueError: no such kernel', file=sys.stderr); sys.exit(1)", "no such"),
        ("import sys; sys.exit(3)", "plain: ended with exit status 3"),
        ("import time; time.sleep(60)", "plain: no answer in time"),
    ],
)
def test_a_process_that_fails_is_named(
    worker: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its error; one that says nothing is not waited for."""
    monkeypatch.setattr(draft_serving, "WORKER", tmp_path / "worker.py")
    (tmp_path / "worker.py").write_text(worker)
    with Server("plain", Path(sys.executable), {}, tmp_path) as server:
        until = time.monotonic() + (1 if "sleep" in worker else 30)
        with pytest.raises(Failed, match=said):
            server.answer(until)
        server.ask(ids=[])


def test_long_answers_come_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed besides goes to the log."""
    monkeypatch.setattr(draft_serving, "WORKER", tmp_path / "worker.py")
    (tmp_path / "worker.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin: print(json.dumps({'ids': json.loads(line)['ids'] * 100000}), flush=True)"
    )
    with Server("draft", Path(sys.executable), {}, tmp_path) as server:
        for ids in ([1], [2]):
            assert server.asked(time.monotonic() + 30, ids=ids)["ids"] == ids * 100000
