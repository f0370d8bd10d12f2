"""Which draft models go with a target; what they propose is tested with the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.drafts.draft_model import check_vocabulary
from compressor.errors import CheckpointError
from tests.tiny import write_byte_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """Of bytes."""
    write_byte_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_the_same_tokens_go_together(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Though special tokens are named for something else."""
    other = AutoTokenizer.from_pretrained(tmp_path, pad_token="<s>")
    check_vocabulary(tokenizer, other, 256, 256)


def test_other_tokens_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """With the first that differs."""
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["word"])
    with pytest.raises(CheckpointError, match=r"in 1 tokens.*'word': number 256 against None"):
        check_vocabulary(tokenizer, other, 257, 257)


def test_another_cut_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The same tokens, found otherwise."""
    from tokenizers import normalizers

    other = AutoTokenizer.from_pretrained(tmp_path)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(CheckpointError, match='cuts "The quick'):
        check_vocabulary(tokenizer, other, 256, 256)


def test_another_size_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """As vLLM does, though the tokens are the same."""
    with pytest.raises(CheckpointError, match=r"264 rows and the target's 256: vLLM"):
        check_vocabulary(tokenizer, tokenizer, 256, 264)
