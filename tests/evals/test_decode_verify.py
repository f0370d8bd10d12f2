"""The rule by which proposed tokens stay: its distribution against the target's, with fixed seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from compressor.drafts.base import Drafter, Proposal
from compressor.drafts.draft_model import DraftModel
from compressor.drafts.repeat import RepeatLast
from compressor.evals.decode import decode
from compressor.evals.decode_verify import pick, verify
from tests.evals.decode_models import prompts, small

WORDS, PLACES, ROWS = 5, 3, 40_000
# The seeds are fixed: a right rule passes or fails once and for all. By chance it fails once in a thousand.
LEAST_P = 1e-3
Rule = Callable[[torch.Tensor, Proposal, float, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def p_value(observed_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    """Of Pearson's chi-square test over cells of at least 5 expected, the others joined."""
    large_N = expected_N >= 5
    observed_N = torch.cat([observed_N[large_N].double(), observed_N[~large_N].sum()[None].double()])
    expected_N = torch.cat([expected_N[large_N].double(), expected_N[~large_N].sum()[None].double()])
    used_N = expected_N > 0
    assert not observed_N[~used_N].any()
    found = ((observed_N - expected_N)[used_N] ** 2 / expected_N[used_N]).sum()
    return float(torch.special.gammaincc((used_N.sum() - 1).double() / 2, found / 2))


def test_the_p_value_is_chi_squares() -> None:
    """Tables: 29.588 is exceeded once in a thousand with 10 degrees of freedom."""
    expected_N = torch.full((11,), 100.0)
    observed_N = expected_N.clone().double()
    step = (29.588 * 100 / 2) ** 0.5
    observed_N[:2] += torch.tensor([step, -step])
    assert p_value(observed_N, expected_N) == pytest.approx(1e-3, rel=1e-3)


def draw(rule: Rule, *, temperature: float, certain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """First two tokens of many sequences by a rule, as counts [V * V], and what the target expects of them.

    The target's second place depends on the first token; the draft's q is another, with words that it never
    proposes and one that the target never says.
    """
    generator = torch.Generator().manual_seed(11)
    first_V = torch.tensor([2.0, 0.5, 1.0, -1.0, -1e9])
    then_VV = torch.randn(WORDS, WORDS, generator=generator) * 1.5
    last_VV = torch.randn(WORDS, WORDS, generator=generator)
    draft_V = torch.tensor([0.1, 0.5, 0.0, 0.2, 0.2])
    draft_VV = torch.softmax(torch.randn(WORDS, WORDS, generator=generator), -1)
    if certain:
        ids_RK = torch.tensor([[1, 0]]).expand(ROWS, 2)
        proposal = Proposal(ids_RK)
    else:
        one_R = torch.multinomial(draft_V, ROWS, replacement=True, generator=generator)
        two_R = torch.multinomial(draft_VV[one_R], 1, generator=generator)[:, 0]
        ids_RK = torch.stack([one_R, two_R], dim=1)
        proposal = Proposal(ids_RK, torch.stack([draft_V.expand(ROWS, -1), draft_VV[one_R]], dim=1))
    logits_RPV = torch.stack([first_V.expand(ROWS, -1), then_VV[ids_RK[:, 0]], last_VV[ids_RK[:, 1]]], dim=1)
    kept_R, own_R = rule(logits_RPV, proposal, temperature, generator)
    made_RP = torch.cat([ids_RK, own_R[:, None]], dim=1)
    made_RP = made_RP.scatter(1, kept_R[:, None], own_R[:, None])
    # Where the first token was the target's own, plain decoding gives the second.
    second_R = pick(then_VV[made_RP[:, 0]], temperature, generator)
    second_R = torch.where(kept_R > 0, made_RP[:, 1], second_R)
    first_p, then_p = (first_V / temperature).softmax(-1), (then_VV / temperature).softmax(-1)
    counts = torch.bincount(made_RP[:, 0] * WORDS + second_R, minlength=WORDS**2)
    return counts, (ROWS * first_p[:, None] * then_p).flatten()


def no_subtraction(
    logits_BPV: torch.Tensor, proposal: Proposal, temperature: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wrong: what is refused is replaced by a draw from p rather than from max(p - q, 0)."""
    kept_B, _ = verify(logits_BPV, proposal, temperature, generator)
    rows = torch.arange(len(kept_B))
    return kept_B, pick(logits_BPV[rows, kept_B], temperature, generator)


def another_q(
    logits_BPV: torch.Tensor, proposal: Proposal, temperature: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wrong: the proposal names another distribution than it was drawn from."""
    assert proposal.probs_BKV is not None
    told_BKV = proposal.probs_BKV.sqrt()
    told_BKV /= told_BKV.sum(-1, keepdim=True)
    return verify(logits_BPV, Proposal(proposal.ids_BK, told_BKV), temperature, generator)


def as_certain(
    logits_BPV: torch.Tensor, proposal: Proposal, temperature: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right, though fewer tokens stay: whatever a token was drawn from, it is one token now."""
    return verify(logits_BPV, Proposal(proposal.ids_BK), temperature, generator)


@pytest.mark.parametrize(("rule", "certain"), [(verify, False), (verify, True), (as_certain, False)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rejection_keeps_the_targets_distribution(rule: Rule, temperature: float, certain: bool) -> None:
    """Pairs of tokens, of drawn proposals and of certain ones."""
    assert p_value(*draw(rule, temperature=temperature, certain=certain)) > LEAST_P


@pytest.mark.parametrize("rule", [no_subtraction, another_q])
def test_the_test_tells_wrong_rules(rule: Rule) -> None:
    """By far."""
    assert p_value(*draw(rule, temperature=1.0, certain=False)) < 1e-12


def test_greedy_keeps_what_the_target_would_say() -> None:
    """By hand: all, some and none; the own token comes from the place after them."""
    logits_BPV = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), 5).float()
    proposal = Proposal(torch.tensor([[1, 2], [1, 4], [0, 2]]))
    kept_B, own_B = verify(logits_BPV, proposal, 0.0, None)
    assert kept_B.tolist() == [2, 1, 0]
    assert own_B.tolist() == [3, 2, 1]


@torch.no_grad()
def _expected(model: PreTrainedModel, ids_T: torch.Tensor, words: int, rows: int) -> torch.Tensor:
    """Of the first three tokens [V * V * V], from passes over every beginning."""

    def after(*more: int) -> torch.Tensor:
        whole_1T = torch.cat([ids_T, torch.tensor(more, dtype=torch.long)])[None]
        return model(whole_1T, use_cache=False).logits[0, -1].float().softmax(-1)

    pairs = [[after(one, two) for two in range(words)] for one in range(words)]
    second = torch.stack([after(one) for one in range(words)])
    third = torch.stack([torch.stack(row) for row in pairs])
    return (rows * after()[:, None, None] * second[:, :, None] * third).flatten()


@pytest.mark.parametrize("which", ["draft_model", "repeat", "plain"])
def test_the_loop_samples_as_the_target_does(which: str) -> None:
    """Triples of tokens from the whole loop, 4,000 sequences in one batch, of different kept lengths."""
    words, rows = 6, 4000
    model, ids_T = small(words, spread=0.25), prompts(1, 5, words)[0]
    drafters: dict[str, Drafter | None] = {
        "draft_model": DraftModel(small(words, seed=5, spread=0.25)),
        "repeat": RepeatLast(),
        "plain": None,
    }
    found = decode(model, drafters[which], [ids_T] * rows, 3, tokens=2, temperature=1.0, seed=3, batch=rows)
    made_RN = torch.tensor(found.ids)
    cells_R = (made_RN[:, 0] * words + made_RN[:, 1]) * words + made_RN[:, 2]
    expected = _expected(model, ids_T, words, rows)
    assert (expected >= 5).sum() > 40  # far from certain
    assert p_value(torch.bincount(cells_R, minlength=words**3), expected) > LEAST_P
    if which == "draft_model":
        kept = [sum(part.accepted_at) for part in found.acceptance]
        assert {0, 1, 2} <= set(kept)


def test_nothing_left_is_drawn_from_the_target() -> None:
    """Where q is p but for rounding, p - q may have no word left: no draw from nothing."""
    logits_BPV = torch.full((1, 2, WORDS), -1e9)
    logits_BPV[:, :, 2] = 0
    probs_BKV = torch.zeros(1, 1, WORDS)
    probs_BKV[0, 0, 2] = 1e9  # a difference that is surely refused
    proposal = Proposal(torch.tensor([[2]]), probs_BKV)
    kept_B, next_B = verify(logits_BPV, proposal, 1.0, torch.Generator().manual_seed(0))
    assert (kept_B.tolist(), next_B.tolist()) == ([0], [2])
