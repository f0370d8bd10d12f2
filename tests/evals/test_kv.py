"""Generation, needles and the whole evaluation of KV formats, on a tiny random model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.errors import UserError
from compressor.evals.kv import KvSpec, evaluate_kv
from compressor.evals.kv_feed import Mode
from compressor.evals.kv_generation import agreement, compare_generation
from compressor.evals.kv_needle import Needle, find_needles, hide_needles
from compressor.evals.kv_record import NeedleCell, NeedleResult
from compressor.progress import Silent
from tests.evals.kv_models import cache_of, ids, tiny, variant

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny random model and its tokenizer."""
    return tiny(tmp_path_factory.mktemp("kv"))


def test_agreement_counts_tokens_up_to_the_first_that_differs() -> None:
    """By hand: a row that comes back together, one that never differs, one that differs at once."""
    usual = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    other = torch.tensor([[1, 0, 3, 4], [5, 6, 7, 8], [0, 0, 9, 0]])
    found = agreement(usual, other)
    assert (found.prompts, found.new_tokens) == (3, 4)
    assert found.until_divergence == pytest.approx((1 + 4 + 0) / 3)
    assert found.agreeing == pytest.approx((3 + 4 + 1) / 12)
    assert found.identical == pytest.approx(1 / 3)


@pytest.mark.parametrize("mode", ["strict", "vllm"])
def test_continuations_are_those_of_one_prompt_at_a_time(pair: Pair, mode: Mode) -> None:
    """Prompt by prompt and token by token, in one forward pass each."""
    model, _ = pair
    prompts = torch.stack([ids(10, seed) for seed in range(3)])

    def slowly(step: float | None) -> torch.Tensor:
        rows = []
        for prompt in prompts:
            cache = cache_of(model, mode, step)()
            with torch.no_grad():
                logits = model(prompt[None], past_key_values=cache, use_cache=True).logits
                row = [int(logits[0, -1].argmax())]
                while len(row) < 12:
                    logits = model(torch.tensor([row[-1:]]), past_key_values=cache, use_cache=True).logits
                    row.append(int(logits[0, -1].argmax()))
            rows.append(row)
        return torch.tensor(rows)

    variants = [variant(model, mode, step) for step in (0.5, 1e-3)]
    found = compare_generation(
        model, prompts, 12, variants, cache_of(model, mode, None), chunk=4, mode=mode, progress=Silent()
    )
    assert found[0] == agreement(slowly(None), slowly(0.5))
    assert found[0].identical < 1


def test_needles_lie_where_they_should(pair: Pair) -> None:
    """Exact length, the number in the needle at its depth and at the end, all different, repeatable."""
    _, tokenizer = pair

    def hide(tokens: int) -> list[Needle]:
        return hide_needles(
            tokenizer, ids(100), tokens=tokens, depths=(0.0, 0.5, 1.0), trials=2, first=254, seed=7
        )

    made = hide(300)
    texts = [tokenizer.decode(needle.ids_T[1:]) for needle in made]
    assert all(len(needle.ids_T) == 300 and needle.ids_T[0] == 254 for needle in made)
    for needle, text in zip(made, texts, strict=True):
        number = tokenizer.decode(needle.ids_T[-needle.answer :]).strip()
        assert number.isdigit()
        assert text.count(number) == 2
        assert text.endswith(f" is {number}")
        assert tokenizer.decode(needle.ids_T[-needle.tail :]).startswith("\n\nThe secret number of the ")
        # The share of what is left beside needle and question, which comes before the needle.
        begin, end = text.index("\n\nThe secret"), text.index("Remember it.\n\n") + 14
        assert begin == round(needle.depth * (text.rindex("\n\nThe secret") - (end - begin)))
    assert len(set(texts)) == 6
    assert all(torch.equal(one.ids_T, other.ids_T) for one, other in zip(made, hide(300), strict=True))
    with pytest.raises(UserError, match="no room for a needle") as raised:
        hide(40)
    needed = int(raised.value.fix.split()[1])
    hide(needed + 20)  # other places have longer names


@pytest.mark.parametrize("mode", ["strict", "vllm"])
def test_answers_are_scored_token_by_token(pair: Pair, mode: Mode) -> None:
    """Log-probabilities of the answers against decoding each text alone."""
    model, tokenizer = pair
    needles = [
        needle
        for tokens in (150, 170)
        for needle in hide_needles(
            tokenizer, ids(80), tokens=tokens, depths=(0.0, 1.0), trials=2, first=None, seed=1
        )
    ]
    usual = cache_of(model, mode, None)
    found = find_needles(
        model, needles, [variant(model, mode)], usual, chunk=9, mode=mode, progress=Silent()
    )[0]
    assert [(cell.tokens, cell.depth, cell.trials) for cell in found.cells] == [
        (tokens, depth, 2) for tokens in (150, 170) for depth in (0.0, 1.0)
    ]
    for number, cell in enumerate(found.cells):
        expected: dict[float | None, float] = {None: 0.0, 0.5: 0.0}
        for needle in needles[2 * number : 2 * number + 2]:
            for step in expected:
                cache = cache_of(model, mode, step)()
                raw = len(needle.ids_T) - max(one.tail for one in needles) if mode == "vllm" else 0
                parts = ([needle.ids_T[:raw]] if raw else []) + list(torch.split(needle.ids_T[raw:], 1))
                with torch.no_grad():
                    logits = torch.cat(
                        [model(part[None], past_key_values=cache, use_cache=True).logits[0] for part in parts]
                    ).log_softmax(-1)
                for position in range(len(needle.ids_T) - needle.answer, len(needle.ids_T)):
                    expected[step] += float(logits[position - 1, needle.ids_T[position]]) / 2
        assert cell.logprob_16bit == pytest.approx(expected[None], rel=1e-4)
        assert cell.logprob == pytest.approx(expected[0.5], rel=1e-4)
        assert (cell.found, cell.found_16bit) == (0, 0)
    assert found.relative_score is None


def test_needle_scores_are_relative_to_16_bit() -> None:
    """By hand."""
    result = NeedleResult(
        (NeedleCell(100, 0.0, 4, 4, 3, -1.0, -2.0), NeedleCell(100, 1.0, 2, 1, 1, -3.0, -2.0))
    )
    assert result.relative_score == pytest.approx(4 / 5)
    assert result.logprob_change == pytest.approx((4 * -1.0 + 2 * 1.0) / 6)


@pytest.mark.parametrize("mode", ["strict", "vllm"])
def test_the_whole_evaluation(pair: Pair, mode: Mode) -> None:
    """Results in the order asked for, whatever chunk each needs; JSON of all; the same again."""
    model, tokenizer = pair
    variants = [variant(model, mode, 0.5, recent=8), variant(model, mode, 0.5), variant(model, mode, 1e-3)]
    spec = KvSpec(context=32, mode=mode, prompts=2, new_tokens=6, needle_tokens=(150,), needle_trials=1)
    found = evaluate_kv(model, tokenizer, ids(100), variants, cache_of(model, mode, None), spec, Silent())
    assert [result.format for result in found] == ["0.5/8", "0.5/0", "0.001/0"]
    windowed, plain, fine = found
    # The window is 8 of 32 tokens at two bytes.
    assert (plain.bits, windowed.bits) == (8.0, 10.0)
    assert plain.bytes_per_token == 2 * 2 * 2 * 16
    assert windowed.text.kl_mean < plain.text.kl_mean
    # Steps of 1e-3 leave a byte a range of an eighth: worse.
    assert fine.text.kl_mean > plain.text.kl_mean
    assert plain.peak_bytes > plain.stored_bytes
    for result in found:
        read = json.loads(json.dumps(result.to_json()))
        assert (read["mode"], read["format"]) == (mode, result.format)
        assert read["kl"]["mean"] == result.text.kl_mean
        assert read["generation"]["prompts"] == 2
        assert len(read["needle"]["cells"]) == 5
    again = evaluate_kv(model, tokenizer, ids(100), variants, cache_of(model, mode, None), spec, Silent())
    assert again == found


def test_generation_and_needles_can_be_left_out(pair: Pair) -> None:
    """Lengths beyond the model are refused before anything runs."""
    model, tokenizer = pair
    usual = cache_of(model, "strict", None)
    spec = KvSpec(context=32, prompts=0)
    found = evaluate_kv(model, tokenizer, ids(64), [variant(model, "strict")], usual, spec, Silent())[0]
    assert (found.generation, found.needle) == (None, None)
    assert found.to_json()["needle"] is None
    for wrong in (KvSpec(context=1000), KvSpec(context=32, needle_tokens=(1000,))):
        with pytest.raises(UserError, match="1000 tokens is longer than the model's 512"):
            evaluate_kv(model, tokenizer, ids(64), [variant(model, "strict")], usual, wrong, Silent())
