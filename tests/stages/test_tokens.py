"""The tokens that a stage keeps: the same on a rerun, with their warnings, and within the embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import CheckpointError
from compressor.progress import Silent
from compressor.spec import TensorHeader
from compressor.stages.tokens import calibration_tokens
from tests.calibration.texts import dataset, words
from tests.tiny import EOS_ID, tiny_llama


class Ear(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def warn(self, text: str) -> None:
        """One more."""
        self.heard.append(text)


@pytest.fixture
def spec(tmp_path: Path) -> CalibrationSpec:
    """Texts, and a conversation that is left out."""
    call = [{"role": "assistant", "content": None}]
    return CalibrationSpec((dataset(tmp_path / "t.jsonl", [call, *[words("a", 90)] * 3]),), 4, 64)


def test_a_rerun_meets_the_same_tokens_and_warnings(tmp_path: Path, spec: CalibrationSpec) -> None:
    """The texts may be gone by then."""
    source = FolderSource(tiny_llama(tmp_path / "model"))
    ears = Ear(), Ear()
    first = calibration_tokens(source, spec, tmp_path / "stage", ears[0])
    (tmp_path / "t.jsonl").unlink()
    second = calibration_tokens(source, spec, tmp_path / "stage", ears[1])
    assert torch.equal(first.ids_NT, second.ids_NT)
    assert first.counts == second.counts == {"t.jsonl": 256}
    assert ears[0].heard == ears[1].heard
    assert "1 conversations of t.jsonl are left out" in ears[0].heard[0]


def test_ids_beyond_the_embedding_are_refused(
    tmp_path: Path, spec: CalibrationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end-of-text token of a tokenizer that belongs to another model; nothing is kept of it."""
    source = FolderSource(tiny_llama(tmp_path / "model"))
    name = "model.embed_tokens.weight"
    short = replace(source.headers[name], shape=(EOS_ID, 64))
    monkeypatch.setattr(source, "headers", {**source.headers, name: short})
    for _ in range(2):
        with pytest.raises(CheckpointError, match="makes id 255, but the embedding has 255 rows"):
            calibration_tokens(source, spec, tmp_path / "stage", Silent())
    assert not (tmp_path / "stage" / "tokens.safetensors").exists()


def test_kept_ids_beyond_the_embedding_are_refused(tmp_path: Path, spec: CalibrationSpec) -> None:
    """A file of a version that did not look; the largest id that there is a row for is fine."""
    source = FolderSource(tiny_llama(tmp_path / "model"))
    for largest in (255, 256):
        folder = tmp_path / str(largest)
        folder.mkdir()
        ids_NT = torch.tensor([[0, largest]])
        header = TensorHeader("ids", "I64", (1, 2))
        with ShardWriter(folder / "tokens.safetensors", [header], {"counts": "{}"}) as writer:
            writer.write("ids", ids_NT)
    assert calibration_tokens(source, spec, tmp_path / "255", Silent()).ids_NT.tolist() == [[0, 255]]
    with pytest.raises(CheckpointError, match="makes id 256, but the embedding has 256 rows"):
        calibration_tokens(source, spec, tmp_path / "256", Silent())


def test_without_a_known_embedding_the_config_decides(
    tmp_path: Path, spec: CalibrationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vocab_size; without one too, nothing is known and nothing refused."""
    source = FolderSource(tiny_llama(tmp_path / "model"))
    headers = {name: header for name, header in source.headers.items() if "embed" not in name}
    monkeypatch.setattr(source, "headers", headers)
    config = {key: value for key, value in source.config.items() if key != "vocab_size"}
    monkeypatch.setattr(source, "config", config | {"vocab_size": 200})
    with pytest.raises(CheckpointError, match="the embedding has 200 rows"):
        calibration_tokens(source, spec, tmp_path / "stage", Silent())
    monkeypatch.setattr(source, "config", config)
    assert calibration_tokens(source, spec, tmp_path / "stage", Silent()).ids_NT.shape == (4, 64)
