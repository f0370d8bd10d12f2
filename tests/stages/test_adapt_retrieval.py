"""Hidden facts: each is told once before it is asked for, and answers weigh what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from compressor.calibration.spec import DatasetSpec
from compressor.checkpoint.folder import FolderSource
from compressor.model.load import load_source_model, load_tokenizer
from compressor.progress import Silent
from compressor.stages.adapt import AdaptSpec, adapt_stage
from compressor.stages.adapt_loss import SequenceLoss
from compressor.stages.adapt_retrieval import Retrieval
from compressor.workspace import file_sha256
from tests.tiny import tiny_llama

LENGTH = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in fp32, whose tokens are bytes."""
    return tiny_llama(tmp_path_factory.mktemp("retrieval") / "model", tie=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    """Its tokenizer."""
    return load_tokenizer(FolderSource(model))


def _ids(tokenizer: Any) -> torch.Tensor:
    text = "The dog ran over the wide field. The cat looked on from its wall. It rained a little. " * 40
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False)[:LENGTH])


def test_answers_are_told_before(tokenizer: Any) -> None:
    """The length stays, every answer stands in the text before the first question, and seeds decide all."""
    ids_T = _ids(tokenizer)
    asked = Retrieval(tokenizer, 1.0, seed=3)
    for number in range(12):
        hidden_T, answer_T = asked.hide(ids_T, number)
        assert answer_T is not None
        assert len(hidden_T) == len(answer_T) == LENGTH
        assert hidden_T[0] == ids_T[0]
        first = int(answer_T.nonzero()[0])
        before = tokenizer.decode(hidden_T[:first].tolist())
        answers = tokenizer.decode(hidden_T[answer_T].tolist()).split()
        assert answers
        assert all(answer in before for answer in answers)
        again_T, _ = Retrieval(tokenizer, 1.0, seed=3).hide(ids_T, number)
        assert torch.equal(again_T, hidden_T)
    other_T, _ = asked.hide(ids_T, 100)
    assert not torch.equal(other_T, asked.hide(ids_T, 101)[0])


def test_share_and_short_sequences(tokenizer: Any) -> None:
    """About the share is changed; sequences without room are not."""
    ids_T = _ids(tokenizer)
    asked = Retrieval(tokenizer, 0.5, seed=0)
    changed = sum(asked.hide(ids_T, number)[1] is not None for number in range(200))
    # 100 are expected; four standard deviations of the binomial distribution are 28.
    assert 72 <= changed <= 128
    assert Retrieval(tokenizer, 1.0, seed=0).hide(ids_T[:200], 0)[1] is None


def test_weighted_loss_is_that_of_all_logits(model: Path) -> None:
    """Weights multiply each token's loss; the other sum is without them."""
    loaded = load_source_model(FolderSource(model), torch.float32)
    ids_BT = torch.arange(40).reshape(1, 40)
    weight_BT = torch.rand((1, 40), generator=torch.Generator().manual_seed(0))
    weighted, plain = SequenceLoss(loaded, torch.float32)(ids_BT, weight_BT)
    nll_N = cross_entropy(loaded(ids_BT, use_cache=False).logits[0, :-1], ids_BT[0, 1:], reduction="none")
    torch.testing.assert_close(weighted, (nll_N * weight_BT[0, 1:]).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(plain, nll_N.sum().detach(), rtol=1e-5, atol=0)
    assert not plain.requires_grad


def test_answers_are_reported_and_learnt_more(model: Path, tmp_path: Path) -> None:
    """The curve of answers is there, resumes exactly, and is what their tokens lose."""
    path = tmp_path / "long.txt"
    path.write_text("The dog ran over the wide field. The cat looked on from its wall. " * 60)
    spec = AdaptSpec(
        (DatasetSpec(path.name, path, file_sha256(path)),),
        LENGTH,
        steps=3,
        sequences=1,
        rank=2,
        alpha=4,
        norms=True,
        embeddings=True,
        warmup_steps=1,
        save_every=2,
        retrieval=1.0,
    )
    source = FolderSource(model)
    (tmp_path / "a").mkdir()
    facts = adapt_stage(source, spec, tmp_path / "a", Silent())["adapt"]
    assert len(facts["answers"]) == 3
    # A random model of 256 bytes guesses: ln 256 nats, more or less.
    assert 4 < facts["answers"][0] < 7
    (tmp_path / "b").mkdir()
    without = adapt_stage(source, replace(spec, retrieval=0.0), tmp_path / "b", Silent())["adapt"]
    assert without["answers"] == [None, None, None]
    assert without["losses"] != facts["losses"]
