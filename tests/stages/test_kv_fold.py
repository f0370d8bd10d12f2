"""A fold is tried on a block before it is believed."""

from __future__ import annotations

import pytest
import torch

from compressor.checkpoint import folded as folded_module
from compressor.checkpoint.folded import KvFold
from compressor.checkpoint.folder import FolderSource
from compressor.model.kv_folding import foldable
from compressor.progress import Silent
from compressor.stages.kv_fold import sound_fold
from tests.model.zoo import FAMILIES


class Told(Silent):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        """See ``Progress.warn``."""
        self.warned.append(text)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss", "llama4", "jamba"])
def test_a_sound_fold_is_kept(name, tmp_path):
    """Values and keys; of Llama 4 keys in other layers than the first."""
    source = FolderSource(FAMILIES[name](tmp_path))
    can = foldable(source.headers, source.config)
    fold = KvFold(tuple(can.values), {layer: torch.full((can.key_heads, 8), 2.0) for layer in can.keys})
    told = Told()
    assert sound_fold(source, fold, told).digest() == fold.digest()
    assert told.warned == []


def test_a_fold_that_changes_the_block_is_dropped(tmp_path, monkeypatch):
    """As if the family did something between v_proj and o_proj that nobody knows of."""
    source = FolderSource(FAMILIES["llama"](tmp_path))
    monkeypatch.setattr(folded_module, "_rotated", lambda x: x.flip(-1) * 1.01)
    told = Told()
    kept = sound_fold(source, KvFold((0, 1), {1: torch.full((2, 8), 2.0)}), told)
    assert kept.values == ()
    assert sorted(kept.keys) == [1]
    assert "values are not rotated" in told.warned[0]
