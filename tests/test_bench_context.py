"""The benchmark of context extension, whole, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.bench import parse
from scripts.benchmarks.context import context
from scripts.benchmarks.process import Failed
from tests.tiny import tiny_llama

SMALL = ["--most-documents", "3", "--trials", "1", "--kinds", "passkey", "--population", "2"]
SMALL += ["--generations", "1", "--search-documents", "1", "--accept-documents", "1", "--adapter-steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads 512 bytes."""
    return tiny_llama(tmp_path_factory.mktemp("bench") / "model", dtype=torch.float32)


def test_every_column(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All ways are measured on the same documents, shown, returned, and kept as they come."""
    options = parse(
        ["context", "--model", str(model), "--factors", "2", "--work", str(tmp_path), "--control", *SMALL]
    )
    found = context(options)["factors"]["x2"]
    columns = ["window", "none", "linear", "ntk", "yarn", "search", "+ adapter 1,024", "window + adapter"]
    for bucket in found["text"]["buckets"]:
        assert list(bucket["nll"]) == columns
    first, last = found["text"]["buckets"][0]["nll"], found["text"]["buckets"][-1]["nll"]
    # Within the trained length the window is the model as it was given; past it they differ.
    assert first["window"] == first["none"]
    assert last["window"] != last["none"]
    assert len({round(last[name], 9) for name in columns[1:5]}) == 4
    assert len(found["text"]["documents"]) == 3
    assert set(found["needles"]) == {"yarn", "search", "+ adapter 1,024"}
    assert found["window + adapter"]["tokens"] == found["+ adapter 1,024"]["tokens"] == 2048
    assert f"| tokens | {' | '.join(columns)} |" in capsys.readouterr().out
    kept = json.loads((tmp_path / "context-x2.json").read_text())
    assert kept["target"] == 1024
    assert set(kept["text"]["buckets"][0]["nll"]) == set(columns)


def test_faults(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents that are too short, and lengths without steps, are told in a line."""
    short = tmp_path / "short.txt"
    short.write_text("too short")
    words = ["context", "--model", str(model), "--work", str(tmp_path), "--documents", str(short)]
    with pytest.raises(Failed, match="0 of 1 documents"):
        context(parse(words))
    with pytest.raises(SystemExit):
        parse([*words, "--adapter-lengths", "512", "1024"])
    assert "are as many" in capsys.readouterr().err
