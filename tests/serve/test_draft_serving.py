"""The script that times drafts in vLLM, with the real engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from compressor.drafts.eagle3_drafter import Eagle3Drafter
from compressor.drafts.eagle3_files import read_head, write_head
from compressor.evals.decode import decode
from compressor.evals.decode_record import Acceptance
from compressor.report.drafts import DraftFacts
from scripts import draft_serving
from tests.drafts.eagle import make_target, trained_head

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

TOKENS, NEW, PROMPT = 3, 24, 16
# Of all proposals: both compute in fp32 what the same head says to the same texts.
POINTS = 0.03


@dataclass(frozen=True)
class _Report:
    drafts: DraftFacts


def test_served_by_turns(
    tmp_path: Path, engine_python: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fp32 every answer is plain decoding's; acceptance is that of our loop, of what does not loop."""
    target = make_target(tmp_path / "out")
    draft = tmp_path / "out/draft"
    draft.mkdir()
    head = trained_head(target, known=None, steps=120)
    write_head(draft, head, verifier=str(target.folder), tokens=TOKENS, dtype=torch.float32)
    facts = DraftFacts(kind="eagle3", tokens=TOKENS, bytes=1, model=None, training=None, decoding=None)
    monkeypatch.setattr(draft_serving, "load_report", lambda folder: _Report(facts))
    monkeypatch.setattr(draft_serving, "RESULT", tmp_path / "result.json")
    chosen = []
    monkeypatch.setattr(draft_serving, "_warm", lambda asked, servers, ids, until: chosen.extend(ids))
    how = {"output": target.folder, "python": engine_python, "work": tmp_path / "work", "dtype": "float32"}
    sizes = {"prompts": 4, "candidates": 12, "prompt-tokens": PROMPT, "new": NEW, "rounds": 2, "gib": 0.1}
    words = [word for key, value in {**how, **sizes}.items() for word in (f"--{key}", str(value))]
    words += ["--engine", '{"enforce_eager": true}', "--domains", "prose", "--concurrency", "1", "2"]
    draft_serving.main(words)
    result = json.loads((tmp_path / "result.json").read_text())
    cells = {(row["concurrency"], row["engine"]): row for row in result["cells"]}
    assert [row["engine"] for row in result["cells"]] == ["plain", "draft"] * 2
    for (concurrency, _), row in cells.items():
        assert row["requests"] == (len(chosen) if concurrency == 1 else max(len(chosen), 4))
        assert row["as_alone"] == row["requests"]
        assert row["looping"] == 0
        assert len(row["speeds"]) == 2
    drafter = Eagle3Drafter(read_head(draft, target.config, target.ends))
    mine = decode(target.model, drafter, [torch.tensor(ids) for ids in chosen], NEW, tokens=TOKENS)
    ours = Acceptance.sum(mine.acceptance, TOKENS)
    for concurrency in (1, 2):
        theirs = cells[concurrency, "draft"]["acceptance"]
        assert theirs["rates"] == pytest.approx(ours.rates, abs=POINTS)
    # Drafts that are never right would agree, too.
    assert ours.length > 1.05
    assert "| prose | 2 | draft |" in capsys.readouterr().out
