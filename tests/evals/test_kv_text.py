"""KV formats on text against decoding one token at a time, and what their caches weigh."""

from __future__ import annotations

from math import exp
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.errors import CheckpointError, UserError
from compressor.evals import kv_feed
from compressor.evals.kv_feed import Mode, continues_in_chunks, feed, fitting_chunk
from compressor.evals.kv_text import ScoredText, score_text
from compressor.progress import Silent
from tests.evals.kv_models import STEP, cache_of, ids, tiny, variant
from tests.model.zoo import FAMILIES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A tiny random model."""
    return tiny(tmp_path_factory.mktemp("kv"))[0]


def _score(
    model: PreTrainedModel,
    ids_T: torch.Tensor,
    mode: Mode,
    *steps: float,
    chunk: int = 128,
    first: int | None = None,
) -> list[ScoredText]:
    variants = [variant(model, mode, step) for step in steps]
    usual = cache_of(model, mode, None)
    return score_text(
        model,
        ids_T,
        variants,
        usual,
        chunk=chunk,
        mode=mode,
        context=24,
        first=first,
        seed=0,
        progress=Silent(),
    )


def _slowly(model: PreTrainedModel, ids_T: torch.Tensor, mode: Mode, first: int | None) -> dict[str, float]:
    """The same figures: windows and tokens one by one, in float64."""
    ahead = [] if first is None else [first]
    losses: list[list[float]] = [[], []]
    kl, agree = [], []
    step = 24 - len(ahead)
    for start in range(0, len(ids_T), step):
        window = torch.tensor([ahead + ids_T[start : start + step].tolist()])
        half = window.shape[1] // 2 if mode == "vllm" else 0
        caches = [cache_of(model, mode, None)(), cache_of(model, mode, STEP)()]
        with torch.no_grad():
            if half:
                for cache in caches:
                    model(window[:, :half], past_key_values=cache, use_cache=True)
            for position in range(half, window.shape[1] - 1):
                source, result = (
                    model(window[:, position : position + 1], past_key_values=cache, use_cache=True)
                    .logits[0, 0]
                    .double()
                    .softmax(-1)
                    for cache in caches
                )
                target = window[0, position + 1]
                losses[0].append(-float(source[target].log()))
                losses[1].append(-float(result[target].log()))
                kl.append(float((source * (source / result).log()).sum()))
                agree.append(bool(source.argmax() == result.argmax()))
    means = [sum(values) / len(values) for values in losses]
    return {
        "perplexity_source": exp(means[0]),
        "perplexity_result": exp(means[1]),
        "kl_mean": sum(kl) / len(kl),
        "kl_p999": max(kl),
        "top1_agreement": sum(agree) / len(agree),
        "scored_tokens": len(kl),
    }


@pytest.mark.parametrize("mode", ["strict", "vllm"])
@pytest.mark.parametrize("first", [None, 254])
def test_chunks_of_many_windows_score_as_decoding_token_by_token(
    model: PreTrainedModel, mode: Mode, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches, chunks and a short last window change nothing but rounding."""
    ids_T = ids(100)
    expected = _slowly(model, ids_T, mode, first)
    assert expected["kl_mean"] > 1e-4  # the codec shows
    for chunk, step_tokens in ((128, 1024), (5, 10), (1, 3)):
        monkeypatch.setattr(kv_feed, "STEP_TOKENS", step_tokens)
        found = _score(model, ids_T, mode, STEP, chunk=chunk, first=first)[0].text
        # float32 sums in another order; the KL of near-equal distributions is a small difference.
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(
                value, rel=1e-3 if name.startswith("kl") else 1e-5
            ), name
        assert (found.tokens, found.context) == (100, 24)
        assert found.increase_ci95 is not None
        assert found.increase_ci95[0] < found.increase < found.increase_ci95[1]


def test_variants_beside_each_other_are_as_alone_and_weigh_what_they_hold(model: PreTrainedModel) -> None:
    """No variant touches another's cache; bytes of one window of 24 tokens."""
    ids_T = ids(96)
    both = _score(model, ids_T, "strict", 0.5, 0.01)
    assert both == [_score(model, ids_T, "strict", step)[0] for step in (0.5, 0.01)]
    assert abs(both[1].text.increase) < abs(both[0].text.increase)
    # 2 layers x K and V x 2 heads x 16: one byte each, against two; decoded float32 of one layer at the peak.
    assert (both[0].weight.tokens, both[0].weight.stored_bytes) == (24, 24 * 2 * 2 * 2 * 16)
    assert both[0].weight_16bit.stored_bytes == 2 * both[0].weight.stored_bytes
    assert both[0].weight.peak_bytes == both[0].weight.stored_bytes + 24 * 2 * 2 * 16 * 4


def test_a_text_without_anything_to_score_is_refused(model: PreTrainedModel) -> None:
    """Two tokens, of which the first is prefilled and nothing follows the second."""
    with pytest.raises(UserError, match="scores nothing"):
        _score(model, ids(2), "vllm", STEP)


def test_broken_logits_are_refused(tmp_path: Path) -> None:
    """NaN names the window."""
    broken = tiny(tmp_path)[0]
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with pytest.raises(CheckpointError, match="the source's logits are NaN or infinite in window 1 "):
        _score(broken, ids(48), "strict", STEP)


@pytest.mark.parametrize(("family", "expected"), [("qwen3_next", True), ("gemma3", True), ("jamba", False)])
def test_models_that_lose_their_state_between_chunks_are_found(
    family: str, expected: bool, tmp_path: Path
) -> None:
    """Jamba of transformers 5.17 continues by single tokens only, and those are right."""
    FAMILIES[family](tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    usual = cache_of(model, "strict", None)
    ids_T = ids(20)
    assert continues_in_chunks(model, ids_T, usual) is expected
    parts = [logits for _, logits in feed(model, ids_T[None], usual(), 1)]
    with torch.no_grad():
        whole = model(ids_T[None], use_cache=False).logits
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-3)


def test_chunks_shrink_for_large_vocabularies() -> None:
    """A million words of float32 logits are 4 MB a token."""
    assert fitting_chunk(128, 50_000) == 128
    assert fitting_chunk(128, 1_000_000) == 67
    assert fitting_chunk(8, 10**9) == 1
