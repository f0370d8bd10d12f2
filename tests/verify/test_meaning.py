"""Edits of generation_config.json, against a source in a folder and one in a GGUF file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.base import Source
from compressor.checkpoint.sources import open_source
from compressor.verify.base import Check
from compressor.verify.inputs import plain_folder
from compressor.verify.meaning import check_meaning
from tests.checkpoint.tiny_gguf import tiny_gguf
from tests.tiny import EOS_ID

GENERATION = "generation_config.json"
WRITTEN = {"eos_token_id": EOS_ID, "temperature": 0.6, "transformers_version": "5.17.0"}


@pytest.fixture
def source(dense: Path, tmp_path: Path) -> Path:
    """A model with a generation config that says how to sample."""
    shutil.copytree(dense, tmp_path / "source")
    write(tmp_path / "source", WRITTEN)
    return tmp_path / "source"


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """What was made from it, untouched."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def write(folder: Path, generation: dict[str, Any]) -> None:
    """Replaces the generation config."""
    (folder / GENERATION).write_text(json.dumps(generation))


def checked(folder: Path, source: Path | Source) -> Check:
    """The check on a copy of ``source``."""
    opened = open_source(str(source)) if isinstance(source, Path) else source
    return check_meaning(folder, opened, near=folder.parent / "work")


def test_an_untouched_result_passes(source: Path, copy: Path) -> None:
    """Nothing is written for a source in a folder."""
    assert checked(copy, source).status == "passed"
    assert not (copy.parent / "work").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"eos_token_id": 7}, "eos_token_id is 7 instead of 255"),
        ({"eos_token_id": [255, 7]}, "eos_token_id is [255, 7] instead of 255"),
        ({"eos_token_id": None}, "eos_token_id is null instead of 255"),
        ({"bos_token_id": 9}, "bos_token_id is 9 instead of null"),
        ({"pad_token_id": 9}, "pad_token_id is 9 instead of null"),
        ({"temperature": 1.5}, "temperature is 1.5 instead of 0.6"),
        ({"use_cache": False}, "use_cache is false instead of null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_generation_is_found(source: Path, copy: Path, change: dict[str, Any], told: str) -> None:
    """Key and both values are named; ids and caches count here, although they do not in config.json."""
    write(copy, WRITTEN | change)
    found = checked(copy, source)
    assert (found.name, found.status) == ("meaning", "failed")
    assert found.detail == f"{GENERATION} differs from the source's: {told}"


def test_who_wrote_it_does_not_count(source: Path, copy: Path) -> None:
    """Another version of transformers, and a null that says nothing."""
    write(copy, WRITTEN | {"transformers_version": "4.57.1", "_from_model_config": True, "top_k": None})
    assert checked(copy, source).status == "passed"


@pytest.mark.parametrize(("text", "told"), [(None, "is missing"), ("[]", "is not a JSON object")])
def test_a_missing_or_broken_file_is_found(source: Path, copy: Path, text: str | None, told: str) -> None:
    """The source has one that can be read."""
    (copy / GENERATION).unlink()
    if text is not None:
        (copy / GENERATION).write_text(text)
    found = checked(copy, source)
    assert found.status == "failed"
    assert found.detail.startswith(f"{GENERATION} {told}")


@pytest.mark.parametrize("text", [None, "[]"], ids=["missing", "broken"])
def test_a_source_without_one_passes(source: Path, copy: Path, text: str | None) -> None:
    """There is nothing to compare with, whether the result has one or not."""
    (source / GENERATION).unlink()
    if text is not None:
        (source / GENERATION).write_text(text)
    assert checked(copy, source).status == "passed"
    (copy / GENERATION).unlink()
    assert checked(copy, source).status == "passed"


def test_a_gguf_source_tells_its_stops(tmp_path: Path) -> None:
    """What its metadata say, as a result of it gets them; the temporary files are gone afterwards."""
    tiny_gguf(tmp_path / "model.gguf")
    source = open_source(str(tmp_path / "model.gguf"))
    folder = plain_folder(source, tmp_path)
    assert checked(folder, source).status == "passed"
    assert list((tmp_path / "work").iterdir()) == []
    generation = json.loads((folder / GENERATION).read_text())
    write(folder, generation | {"eos_token_id": 3})
    assert f"eos_token_id is 3 instead of {generation['eos_token_id']}" in checked(folder, source).detail
