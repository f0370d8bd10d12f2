"""Whether a source that must be written for an engine fits on the disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressor.checkpoint.base import Source
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.checkpoint.sources import open_source
from compressor.cli.verify import LEAST_TOKENS as LEAST_ASKED_FOR
from compressor.progress import Silent
from compressor.verify.inputs import LEAST_POSITIONS, missing_room, plain_folder, tokens_of
from compressor.verify.judge import LEAST_TOKENS
from compressor.verify.run import _source_of_floor
from tests.calibration.texts import byte_tokenizer
from tests.checkpoint.tiny_gguf import tiny_gguf


@dataclass(frozen=True)
class Usage:
    """What ``shutil.disk_usage`` returns, as far as it is asked."""

    free: int


class Warned(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, message: str) -> None:
        """See ``Progress.warn``."""
        self.texts.append(message)


@pytest.fixture
def gguf(tmp_path: Path) -> Source:
    """A GGUF source."""
    tiny_gguf(tmp_path / "model.gguf")
    return open_source(str(tmp_path / "model.gguf"))


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Makes the disk have so many bytes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free))


def test_weights_and_side_files_must_fit(
    gguf: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, by what is written then: two bytes a weight, tokenizer and templates."""
    folder = plain_folder(gguf, tmp_path)
    weights = sum(2 * header.numel for header in gguf.headers.values())
    besides = {"model.safetensors", "config.json"}
    side = sum(path.stat().st_size for path in folder.iterdir() if path.name not in besides)
    assert side > 0
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    set_free(monkeypatch, weights + side)
    assert missing_room(gguf, scratch) == ""
    set_free(monkeypatch, weights + side - 1)
    assert f"MB in {scratch}" in missing_room(gguf, scratch)
    assert list(scratch.iterdir()) == []


def test_without_room_there_is_no_floor_but_a_warning(
    gguf: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is asked all the same: a typical floor does."""
    progress = Warned()
    assert _source_of_floor(gguf, tmp_path, progress) is gguf
    assert progress.texts == []
    set_free(monkeypatch, 1000)
    assert _source_of_floor(gguf, tmp_path, progress) is None
    [text] = progress.texts
    assert text.startswith("no noise floor is measured: the source takes")


def test_a_folder_is_loaded_where_it_lies(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, so that no room is needed."""
    set_free(monkeypatch, 0)
    source = open_source(str(dense))
    assert missing_room(source, tmp_path) == ""
    assert plain_folder(source, tmp_path) == dense
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("longest", [LEAST_POSITIONS, 512])
def test_the_fewest_tokens_are_enough_for_a_verdict(tmp_path: Path, longest: int) -> None:
    """In the shortest windows too, each of which begins with a token that is not scored."""
    found = tokens_of(byte_tokenizer(tmp_path), "calibration/heldout.jsonl", LEAST_ASKED_FOR, longest)
    assert found.scored >= LEAST_TOKENS


def test_a_source_under_another_config_shares_its_weights(dense: Path, tmp_path: Path) -> None:
    """Links to the files, and nothing written but the small ones: no room is needed."""
    source = open_source(str(dense))
    config = source.config | {"max_position_embeddings": 4096}
    scaled = ReconfiguredSource(source, config, 4096)
    assert missing_room(scaled, tmp_path) == ""
    folder = plain_folder(scaled, tmp_path)
    assert json.loads((folder / "config.json").read_text()) == config
    assert (folder / "model.safetensors").resolve() == (dense / "model.safetensors").resolve()
