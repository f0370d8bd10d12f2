"""``compressor.compare``: what it says of a source that is another model."""

from __future__ import annotations

from pathlib import Path

import pytest

import compressor
from compressor.compare import compare
from compressor.errors import CheckpointError
from compressor.progress import Silent
from compressor.workspace import Workspace
from tests.e2e.cases import write_recipe
from tests.tiny import tiny_llama, tiny_llama4


def test_a_source_of_another_family_is_named(tmp_path: Path) -> None:
    """The checkpoint has all its tensors: its experts are put together by the source's names."""
    right, other = tiny_llama4(tmp_path / "right"), tiny_llama(tmp_path / "other")
    recipe = write_recipe(tmp_path / "recipe.yaml", right, "{scheme: int8}")
    result = compressor.run(recipe, output=tmp_path / "out" / "result").output
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)

    def measured(source: Path) -> float:
        found = compare(
            result,
            str(source),
            str(text),
            revision=None,
            tokens=64,
            context=32,
            space=Workspace(tmp_path / "space"),
            progress=Silent(),
        )
        return found.text.kl_mean

    assert measured(right) < 0.1
    with pytest.raises(
        CheckpointError, match="the source is a llama, the checkpoint a llama4_text"
    ) as caught:
        measured(other)
    assert caught.value.fix == "name the source that it was made from"
