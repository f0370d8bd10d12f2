"""Decoding with proposals against decoding one token at a time, on tiny random models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from compressor.drafts.base import LAST, Drafter, Proposal
from compressor.drafts.draft_model import DraftModel
from compressor.drafts.lookup import PromptLookup
from compressor.drafts.repeat import RepeatLast
from compressor.errors import CheckpointError, UserError
from compressor.evals.decode import decode
from compressor.evals.decode_record import Acceptance
from tests.evals.decode_models import family, prompts, slowly, small

NEW = 20


class Oracle:
    """Proposes what was written down, made wrong at random: proposals of every kept length."""

    layers: tuple[int, ...] = ()

    def __init__(self, answers: Mapping[tuple[int, ...], tuple[int, ...]], words: int) -> None:
        self.answers, self.words = answers, words
        self.generator = torch.Generator().manual_seed(1)

    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """Finds each prompt's continuation."""
        self.rows = [(*self.answers[tuple(ids)], *[0] * 99) for ids in ids_BT.tolist()]
        self.places = [1] * len(self.rows)

    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """Each token is wrong one time in three."""
        told = [row[place : place + count] for row, place in zip(self.rows, self.places, strict=True)]
        ids_BK = torch.tensor(told)
        wrong_BK = torch.rand(ids_BK.shape, generator=self.generator) < 1 / 3
        return Proposal(torch.where(wrong_BK, (ids_BK + 1) % self.words, ids_BK))

    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """Steps on."""
        self.places = [place + kept + 1 for place, kept in zip(self.places, kept_B.tolist(), strict=True)]

    def select(self, rows_R: torch.Tensor) -> None:
        """Some rows."""
        self.rows = [self.rows[row] for row in rows_R.tolist()]
        self.places = [self.places[row] for row in rows_R.tolist()]


def oracle(model: PreTrainedModel, texts: list[torch.Tensor]) -> tuple[Oracle, list[tuple[int, ...]]]:
    """With the model's own continuations, found slowly."""
    wanted = [slowly(model, ids_T, NEW) for ids_T in texts]
    answers = {tuple(ids_T.tolist()): ids for ids_T, ids in zip(texts, wanted, strict=True)}
    return Oracle(answers, int(model.config.get_text_config().vocab_size)), wanted


# Plain and tied heads, windows and chunks shorter than the text, learned and ALiBi positions, MLA, experts.
ROWS = [
    *("llama_tied", "gemma3", "mistral", "llama4", "gpt_oss", "gpt2", "opt", "bloom", "deepseek_v3"),
    *("glm4_moe", "falcon"),
]


@pytest.mark.parametrize("name", ROWS)
def test_continuations_are_those_of_plain_decoding(name: str, tmp_path: Path) -> None:
    """Token-identical in float32 with proposals of every kept length, alone and four at a time.

    Three lengths of prompts, so that a batch is not always full.
    """
    model = family(name, tmp_path)
    texts = [*prompts(4, 11, 250), *prompts(1, 5, 250)]
    drafter, wanted = oracle(model, texts)
    for batch in (1, 4):
        plain = decode(model, None, texts, NEW, batch=batch)
        assert list(plain.ids) == wanted
        assert plain.passes == (NEW - 1) * (5 if batch == 1 else 2)
        found = decode(model, drafter, texts, NEW, tokens=3, batch=batch)
        assert list(found.ids) == wanted
        kept = {place for part in found.acceptance for place, count in enumerate(part.accepted_at) if count}
        assert kept == {0, 1, 2}
        assert any(part.accepted_at[0] < part.drafts for part in found.acceptance)
        assert found.passes < plain.passes


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe", "nemotron_h", "lfm2"])
def test_states_that_cannot_forget_are_read_again(name: str, tmp_path: Path) -> None:
    """Hybrids: token-identical at batch 1, refused with the reason beyond."""
    model = family(name, tmp_path)
    texts = prompts(3, 9, 250)
    drafter, wanted = oracle(model, texts)
    found = decode(model, drafter, texts, NEW, tokens=3)
    assert list(found.ids) == wanted
    part = Acceptance.sum(found.acceptance, 3)
    assert 0 < part.accepted_at[2] < part.accepted_at[0] < part.drafts
    with pytest.raises(CheckpointError, match=r"LinearAttentionLayer.*cannot keep different numbers"):
        decode(model, drafter, texts, NEW, tokens=3, batch=2)
    # Plain decoding takes nothing back.
    assert list(decode(model, None, texts, NEW, batch=2).ids) == wanted


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_draft_models_read_what_stayed(batch: int, count: int) -> None:
    """Another model's proposals, and the target's own, which all stay but where the text ends."""
    model, texts = small(), prompts(3, 6, 12)
    wanted = [slowly(model, ids_T, NEW) for ids_T in texts]
    other = decode(model, DraftModel(small(seed=1)), texts, NEW, tokens=count, batch=batch)
    assert list(other.ids) == wanted
    own = decode(model, DraftModel(small()), texts, NEW, tokens=count, batch=batch)
    assert list(own.ids) == wanted
    for part in own.acceptance:
        assert part.drafts == -(-(NEW - 1) // (count + 1))
        assert part.accepted_at == (part.drafts,) * count


class Checked:
    """A draft model whose proposals are compared with what it says after the text so far, read afresh."""

    layers: tuple[int, ...] = ()

    def __init__(self, draft: PreTrainedModel) -> None:
        self.draft, self.drafter = draft, DraftModel(draft)
        self.kept: set[int] = set()

    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """Starts each sequence's text."""
        self.texts = [[*ids, own] for ids, own in zip(ids_BT.tolist(), next_B.tolist(), strict=True)]
        self.drafter.begin(ids_BT, hidden, next_B)

    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """Compares."""
        found = self.drafter.propose(count, generator, temperature)
        self.proposed = found.ids_BK.tolist()
        for text, ids in zip(self.texts, self.proposed, strict=True):
            assert tuple(ids) == slowly(self.draft, torch.tensor(text), count)
        return found

    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """Continues each text."""
        rows = zip(self.texts, self.proposed, kept_B.tolist(), next_B.tolist(), strict=True)
        for text, ids, kept, own in rows:
            text += [*ids[:kept], own]
            self.kept.add(kept)
        self.drafter.keep(hidden, kept_B, next_B)

    def select(self, rows_R: torch.Tensor) -> None:
        """Some rows."""
        self.texts = [self.texts[row] for row in rows_R.tolist()]
        self.drafter.select(rows_R)


@pytest.mark.parametrize(
    ("name", "batch"), [("llama", 1), ("llama", 4), ("mistral", 1), ("mistral", 4), ("qwen3_next", 1)]
)
def test_a_draft_model_keeps_no_trace_of_what_was_refused(name: str, batch: int, tmp_path: Path) -> None:
    """The draft is the target with noise, so that all, some and none of its tokens stay."""
    target, draft = family(name, tmp_path / "target"), family(name, tmp_path / "draft")
    generator = torch.Generator().manual_seed(0)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * parameter.std(), alpha=0.02)
    drafter = Checked(draft)
    decode(target, drafter, prompts(4, 9, 250), NEW, tokens=3, batch=batch)
    assert {0, 1, 3} <= drafter.kept


def test_stop_tokens_end_a_sequence_and_the_others_go_on() -> None:
    """Whatever the batch, and though a proposal ran past the stop; the last proposal is counted whole."""
    model, texts = small(), prompts(4, 6, 12)
    drafter, wanted = oracle(model, texts)
    stop = frozenset({wanted[0][4], wanted[1][9]})
    ended = []
    for ids in wanted:
        places = [place for place, token in enumerate(ids) if token in stop]
        ended.append(ids[: places[0] + 1] if places else ids)
    assert len(set(map(len, ended))) > 1
    for batch in (1, 4):
        drafters: list[Drafter | None] = [None, drafter, DraftModel(small()), PromptLookup(), RepeatLast()]
        for one in drafters:
            found = decode(model, one, texts, NEW, tokens=3, batch=batch, stop=stop)
            assert list(found.ids) == ended
            if isinstance(one, DraftModel):
                assert [part.accepted_at[2] for part in found.acceptance] == [
                    -(-(len(ids) - 1) // 4) for ids in ended
                ]


def test_drafters_are_given_the_hidden_states_of_the_tokens() -> None:
    """Of the prompt, and of the last token with the proposed ones: as one pass over them all gives them."""
    model, seen = small(layers=3), []
    head = model.get_output_embeddings()

    class Watch(RepeatLast):
        layers = (LAST, 1)

        def begin(
            self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor
        ) -> None:
            super().begin(ids_BT, hidden, next_B)
            assert torch.equal(head(hidden[LAST][:, -1]).argmax(-1), next_B)
            self.texts_BT = ids_BT
            self.check(ids_BT, hidden)

        def check(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor]) -> None:
            whole = model(ids_BT, use_cache=False, output_hidden_states=True).hidden_states
            tokens = hidden[1].shape[1]
            # Values up to about 30, summed in another order.
            torch.testing.assert_close(hidden[1], whole[1][:, -tokens:], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(hidden[LAST], whole[-1][:, -tokens:], rtol=1e-4, atol=1e-3)
            seen.append(tokens)

        def keep(
            self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor
        ) -> None:
            proposed = self.propose(2, None, 0.0).ids_BK
            read = torch.cat([self.texts_BT, self._last_B[:, None], proposed], dim=1)
            self.check(read, hidden)
            self.texts_BT = read[:, : self.texts_BT.shape[1] + 1 + int(kept_B)]
            super().keep(hidden, kept_B, next_B)

    decode(model, Watch(), prompts(1, 7, 12), 6, tokens=2)
    assert seen[0] == 7
    assert set(seen[1:]) == {3}


def test_what_does_not_fit_is_refused() -> None:
    """A continuation past the model's positions; logits that are no numbers."""
    model = small()
    with pytest.raises(UserError, match="are 259 tokens, and the model reads 256"):
        decode(model, RepeatLast(), prompts(1, 236, 12), 20, tokens=3)
    decode(model, None, prompts(1, 236, 12), 20)
    broken = small()
    broken.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        decode(broken, None, prompts(1, 4, 12), 2)
