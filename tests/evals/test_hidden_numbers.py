"""Numbers in a text, and where their answers are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from compressor.errors import UserError
from compressor.evals.hidden_numbers import MOST_NUMBERS, hide_numbers
from compressor.model.load import load_tokenizer
from tests.tiny import tiny_llama

FILLER = "and so it went on and on. "


@pytest.mark.parametrize("count", [1, 3, MOST_NUMBERS])
def test_each_number_stands_once_in_its_part_and_is_asked_for(tmp_path: Path, count: int) -> None:
    """Read back as text: evenly hidden, each asked for once, and the answers' tokens are the numbers."""
    tokenizer = load_tokenizer(tiny_llama(tmp_path))
    plain_T = torch.tensor(tokenizer.encode(FILLER * 200, add_special_tokens=False))
    made = hide_numbers(tokenizer, plain_T, count=count, seed=5)
    assert len(made.ids_T) == len(plain_T)
    text = tokenizer.decode(made.ids_T)
    hidden = re.findall(r"The (\w+) code is (\d+)\. Remember it\.", text)
    asked = re.findall(r"The (\w+) code is (\d+)(?!\d|\.)", text)
    assert len(hidden) == count
    assert sorted(hidden) == sorted(asked)
    assert tokenizer.decode(made.ids_T[made.answer_A]) == "".join(f" {number}" for _, number in asked)
    # A byte is a token here: in the middle of each part of what is left of the text.
    places = [match.start() / len(text) for match in re.finditer("Remember it", text)]
    for index, place in enumerate(places):
        assert index / count < place < (index + 1) / count
    again = hide_numbers(tokenizer, plain_T, count=count, seed=5)
    other = hide_numbers(tokenizer, plain_T, count=count, seed=6)
    assert torch.equal(made.ids_T, again.ids_T)
    assert not torch.equal(made.ids_T, other.ids_T)


def test_a_short_text_has_no_room(tmp_path: Path) -> None:
    """A sentence, not an index error."""
    tokenizer = load_tokenizer(tiny_llama(tmp_path))
    with pytest.raises(UserError, match="no room for 4 numbers"):
        hide_numbers(tokenizer, torch.zeros(60, dtype=torch.int64), count=4, seed=0)
