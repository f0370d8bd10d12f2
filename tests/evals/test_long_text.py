"""Likelihood by position and through a sliding window, against loops that read token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from compressor.errors import CheckpointError, UserError
from compressor.evals import long_text
from compressor.evals.long_record import bucket_edges, by_position, paired_difference
from compressor.evals.long_text import Documents, Sliding, long_documents, measure
from compressor.progress import Silent
from tests.tiny import BOS_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rounding of float32 sums in another order.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-5}
TOKENS = 53


def _documents(first: int | None, count: int = 3) -> Documents:
    ids_NT = torch.randint(32, 120, (count, TOKENS), generator=torch.Generator().manual_seed(1))
    if first is not None:
        ids_NT[:, 0] = first
    return Documents(ids_NT, tuple(f"d{number}" for number in range(count)), first, 0)


def _one(model: PreTrainedModel, before: torch.Tensor, token: torch.Tensor) -> float:
    """Of one token after those before it, by the model's own logits."""
    with torch.no_grad():
        return -float(model(before[None], use_cache=False).logits[0, -1].double().log_softmax(-1)[token])


@pytest.mark.parametrize("first", [None, BOS_ID])
def test_every_token_is_scored_from_all_before_it(
    model: PreTrainedModel, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of logits of any size."""
    monkeypatch.setattr(long_text, "LOGIT_BYTES", 7 * 2 * 4 * 256)
    documents = _documents(first)
    wanted_NP = torch.tensor(
        [[_one(model, ids_T[:p], ids_T[p]) for p in range(1, TOKENS)] for ids_T in documents.ids_NT]
    )
    found_NP = measure(model, documents, progress=Silent())
    torch.testing.assert_close(found_NP, wanted_NP, **CLOSE)


@pytest.mark.parametrize("first", [None, BOS_ID])
@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 15), (20, 1), (40, 7), (TOKENS, 3), (99, 9)])
def test_a_window_slides(model: PreTrainedModel, first: int | None, window: int, stride: int) -> None:
    """Each token sees the end of what is before it: between window - stride and window - 1 tokens of it."""
    documents = _documents(first, count=1)
    ids_T, ahead = documents.ids_NT[0], int(first is not None)
    wanted = []
    for p in range(1, TOKENS):
        seen = p
        if p >= window:
            seen = window - stride + (p - window) % stride
            assert window - stride <= seen < window
        before = ids_T[p - seen : p] if seen == p else torch.cat([ids_T[:ahead], ids_T[p - seen + ahead : p]])
        wanted.append(_one(model, before, ids_T[p]))
    found_NP = measure(model, documents, sliding=Sliding(window, stride), progress=Silent())
    torch.testing.assert_close(found_NP[0], torch.tensor(wanted), **CLOSE)


@pytest.mark.parametrize(("window", "stride"), [(16, 0), (16, 16), (16, 20)])
def test_windows_that_cannot_slide(model: PreTrainedModel, window: int, stride: int) -> None:
    """They would score tokens never, or from nothing."""
    with pytest.raises(UserError, match="cannot slide"):
        measure(model, _documents(None), sliding=Sliding(window, stride), progress=Silent())


def test_a_head_with_more_to_it(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model changes its logits, its own are taken: in several passes over the text."""
    documents = _documents(None, count=1)
    plain_P = measure(model, documents, progress=Silent())
    monkeypatch.setattr(long_text, "plain_head", lambda *_: False)
    monkeypatch.setattr(long_text, "COSTLY_LOGIT_BYTES", 20 * 2 * 4 * 256)
    torch.testing.assert_close(measure(model, documents, progress=Silent()), plain_P, **CLOSE)


def test_what_is_kept_is_not_computed_again(model: PreTrainedModel) -> None:
    """A row is asked for by its document's number."""
    documents, kept = _documents(None), {1: torch.ones(TOKENS - 1)}
    computed = []

    def keep(number: int, compute: Any) -> torch.Tensor:
        if number not in kept:
            computed.append(number)
            kept[number] = compute()
        return kept[number]

    first_NP = measure(model, documents, progress=Silent(), kept=keep)
    assert computed == [0, 2]
    assert torch.equal(first_NP[1], torch.ones(TOKENS - 1))
    assert torch.equal(measure(model, documents, progress=Silent(), kept=keep), first_NP)
    assert computed == [0, 2]


def test_not_a_number_is_refused(folder: Path) -> None:
    """With the document's name."""
    broken = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        broken.model.embed_tokens.weight[33] = float("nan")
    documents = _documents(None)
    documents.ids_NT[0].clamp_(min=34)
    documents.ids_NT[1, 9] = 33
    with pytest.raises(CheckpointError, match="the result's logits are NaN or infinite in d1"):
        measure(broken, documents, progress=Silent(), label="result")


def test_learned_positions_end() -> None:
    """Rotary ones do not: a model is measured past its length on purpose."""
    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(UserError, match="53 tokens are more than the model's 32 positions"):
        measure(GPT2LMHeadModel(config).eval(), _documents(None), progress=Silent())


def test_documents_that_are_long_enough(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The first of them, cut, by id or line; the others are counted."""
    path = tmp_path / "long.jsonl"
    lines = [{"text": "a" * 40, "id": "one"}, {"text": "b"}, {"text": "é" * 10}, {"text": "c" * 20}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    found = long_documents(tokenizer, path, documents=2, tokens=20, first=BOS_ID)
    assert found.names == ("one", "line 3")
    assert found.skipped == 1
    assert found.ids_NT.tolist() == [[BOS_ID, *b"a" * 19], [BOS_ID, *("é" * 10).encode()[:19]]]
    with pytest.raises(UserError, match="1 of 4 documents have 21 tokens, 2 are asked for"):
        long_documents(tokenizer, path, documents=2, tokens=21, first=None)
    with pytest.raises(UserError, match=r"the longest has 40\n"):
        long_documents(tokenizer, path, documents=1, tokens=41, first=None)


def test_edges() -> None:
    """In eighths, halves and doubles of the trained length."""
    assert bucket_edges(8192, 131072) == (0, 1024, 4096, 8192, 16384, 32768, 65536, 131072)
    assert bucket_edges(8192, 20000) == (0, 1024, 4096, 8192, 16384, 20000)
    assert bucket_edges(8192, 4096) == (0, 1024, 4096)
    assert bucket_edges(8, 20) == (0, 4, 8, 16, 20)


def test_buckets_against_a_loop() -> None:
    """Means over documents and positions; differences over documents."""
    generator = torch.Generator().manual_seed(0)
    measured = {name: torch.rand(4, 31, generator=generator) for name in ("source", "sliding", "result")}
    edges = (0, 1, 4, 8, 32)
    found = by_position(
        measured,
        edges,
        names=("a", "b", "c", "d"),
        reference="sliding",
        window=8,
        stride=2,
        dtype="float32",
        seed=3,
    )
    # No token is scored at position 0.
    assert [(bucket.start, bucket.stop) for bucket in found.buckets] == [(1, 4), (4, 8), (8, 32)]
    for bucket in found.buckets:
        positions = range(bucket.start, bucket.stop)
        for name, nll_NP in measured.items():
            values = [float(nll_NP[n, p - 1]) for n in range(4) for p in positions]
            assert bucket.nll[name] == pytest.approx(sum(values) / len(values), abs=1e-12)
        for name in ("source", "result"):
            change = bucket.change[name]
            assert change.mean == pytest.approx(bucket.nll[name] - bucket.nll["sliding"], abs=1e-12)
            assert change.ci95 is not None
            assert change.ci95[0] < change.mean < change.ci95[1]
        assert "sliding" not in bucket.change
    assert [position for position, _ in found.curve] == list(range(1, 32))
    assert found.curve[0][1]["result"] == pytest.approx(float(measured["result"][:, 0].mean()), abs=1e-7)
    written = json.loads(json.dumps(found.to_json()))
    assert written["buckets"][2]["change"]["result"]["ci95"] is not None
    assert len(written["curve"]["nll"]["sliding"]) == len(written["curve"]["position"]) == 31
    alone = by_position(
        {"model": measured["result"][:1]},
        edges,
        names=("a",),
        reference="model",
        window=None,
        stride=None,
        dtype="float32",
    )
    assert alone.buckets[0].change == {}
    assert replace(alone, names=()).to_json()["documents"] == []


def test_the_interval_is_of_documents() -> None:
    """Differences that all documents share have none; one document has none either."""
    one_N = torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)
    same = paired_difference(one_N, one_N - 0.5, seed=0)
    assert (same.mean, same.ci95) == (0.5, (0.5, 0.5))
    assert paired_difference(one_N[:1], one_N[:1] - 1, seed=0).ci95 is None
    # With two documents a quarter of the draws is one of them twice.
    spread = paired_difference(one_N[:2], torch.zeros(2, dtype=torch.float64), seed=0)
    assert spread.ci95 == (1.0, 5.0)
