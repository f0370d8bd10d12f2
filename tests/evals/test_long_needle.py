"""Passkeys and needles in long texts: what the texts hold, and what counts as found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from compressor.errors import UserError
from compressor.evals import long_needle
from compressor.evals.kv_needle import Needle
from compressor.evals.long_needle import KINDS, Kind, find, hide
from compressor.progress import Silent
from tests.tiny import BOS_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = "Real text goes on and on. "


def _hide(tokenizer: PreTrainedTokenizerBase, kind: Kind, **changed: Any) -> list[Needle]:
    text_T = torch.tensor(tokenizer.encode(TEXT, add_special_tokens=False))
    asked: dict[str, Any] = {"tokens": 600, "depths": (0.0, 0.5, 1.0), "trials": 2, "first": None, "seed": 4}
    return hide(tokenizer, kind, text_T, **(asked | changed))


@pytest.mark.parametrize("first", [None, BOS_ID])
def test_passkeys_have_the_common_wording(tokenizer: PreTrainedTokenizerBase, first: int | None) -> None:
    """Opening, filler, key, filler, question, answer: exactly as many tokens as asked for."""
    hidden = _hide(tokenizer, "passkey", first=first)
    assert [needle.depth for needle in hidden] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    numbers = set()
    for needle in hidden:
        assert len(needle.ids_T) == 600
        text = tokenizer.decode(needle.ids_T[int(first is not None) :])
        number = text.rsplit(" ", 1)[1]
        numbers.add(number)
        assert 1 <= int(number) <= 50_000
        assert text.startswith("There is an important info hidden inside a lot of irrelevant text.")
        assert text.endswith(f"\nWhat is the pass key? The pass key is {number}")
        line = f"\nThe pass key is {number}. Remember it. {number} is the pass key.\n"
        assert text.count(line) == 1
        assert "Here we go. There and back again. The grass is green. The sky" in text
        before, after = text.removesuffix(f"\nWhat is the pass key? The pass key is {number}").split(line)
        before = before.split("information there.\n")[1]
        # To the nearest byte of the filler.
        assert len(before) / len(before + after) == pytest.approx(needle.depth, abs=0.005)
    assert len(numbers) == len(hidden)


def test_needles_are_in_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Which begins again where it ends."""
    (needle,) = _hide(tokenizer, "needle", depths=(0.5,), trials=1)
    text = tokenizer.decode(needle.ids_T)
    assert text.count("The secret number of the ") == 2
    assert text.count("goes on and on") > 10


def test_the_same_seed_hides_the_same(tokenizer: PreTrainedTokenizerBase) -> None:
    """And another seed another number."""
    for kind in KINDS:
        one, same, other = (_hide(tokenizer, kind, seed=seed)[0].ids_T for seed in (4, 4, 5))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_too_short_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Says how long it must be."""
    with pytest.raises(UserError, match="no room for a needle and its question"):
        _hide(tokenizer, "passkey", tokens=100)


def test_found_is_what_greedy_decoding_gives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of the model's own continuation and of any other answer; log-probabilities by its own logits."""
    made = []
    for number, needle in enumerate(_hide(tokenizer, "passkey")):
        prompt_T = needle.ids_T[: -needle.answer]
        greedy = model.generate(
            prompt_T[None],
            attention_mask=torch.ones_like(prompt_T[None]),
            max_new_tokens=needle.answer,
            min_new_tokens=needle.answer,
            do_sample=False,
            pad_token_id=0,
        )[0]
        ids_T = greedy if number % 2 else needle.ids_T
        made.append(Needle(needle.depth, ids_T, needle.answer, needle.tail))
    cells = find(model, "passkey", made, progress=Silent())
    assert [(cell.kind, cell.tokens, cell.depth, cell.trials, cell.found) for cell in cells] == [
        ("passkey", 600, depth, 2, 1) for depth in (0.0, 0.5, 1.0)
    ]
    for cell in cells:
        wanted = []
        for needle in made:
            if needle.depth == cell.depth:
                with torch.no_grad():
                    logits_TV = model(needle.ids_T[None]).logits[0].double().log_softmax(-1)
                begin = 600 - needle.answer
                wanted.append(sum(float(logits_TV[p - 1, needle.ids_T[p]]) for p in range(begin, 600)))
        # Rounding of float32.
        assert cell.logprob == pytest.approx(sum(wanted) / 2, abs=1e-3)


def test_what_is_kept_is_not_computed_again(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A needle is asked for by its number."""
    made = _hide(tokenizer, "needle", trials=1)
    kept = {0: (-1.5, True)}

    def keep(number: int, compute: Any) -> tuple[float, bool]:
        return kept[number] if number in kept else kept.setdefault(number, compute())

    first = find(model, "needle", made, progress=Silent(), kept=keep)
    assert (first[0].logprob, first[0].found) == (-1.5, 1)
    monkeypatch.setattr(long_needle, "_answer", None)
    assert find(model, "needle", made, progress=Silent(), kept=keep) == first
