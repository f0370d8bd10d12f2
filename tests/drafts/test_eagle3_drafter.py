"""The drafter's cache holds what a head would compute anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.drafts.eagle3 import Eagle3Head
from compressor.drafts.eagle3_drafter import Eagle3Drafter
from compressor.evals.decode import decode
from tests.drafts.eagle import make_head, make_target, slow_logits, slow_outputs

BATCH, PROMPT, TOKENS, ROUNDS = 3, 5, 3, 6
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def _slow_probs(
    head: Eagle3Head, ids: list[int], hidden_TD: torch.Tensor, drafted: list[int]
) -> torch.Tensor:
    """Distributions over the target's vocabulary [K, V] behind a text: every slot computed for every step."""
    states_TD = hidden_TD @ head.get_parameter("fc.weight").T
    rows = []
    for step in range(TOKENS):
        out_D = slow_outputs(head, [*ids[1:], *drafted[:step]], states_TD)[-1]
        probs_R = (slow_logits(head, out_D) / 0.7).softmax(-1)
        probs_V = torch.zeros(head.shape.vocabulary)
        probs_V[slice(None) if head.vocabulary is None else head.vocabulary.ids_R] = probs_R
        rows.append(probs_V)
        states_TD = torch.cat([states_TD, out_D[None]])
    return torch.stack(rows)


@pytest.mark.parametrize("known", [None, 100])
@torch.no_grad()
def test_equals_computing_all_slots_anew(known: int | None, tmp_path: Path) -> None:
    """Whatever stays of the proposals of each sequence, also after one has left the batch."""
    head = make_head(make_target(tmp_path / "target"), known=known)
    drafter, width = Eagle3Drafter(head), head.shape.hidden_size
    draw = torch.Generator().manual_seed(0)

    def states(rows: int, count: int) -> dict[int, torch.Tensor]:
        return {n: torch.randn(rows, count, width, generator=draw) for n in drafter.layers}

    def joined(hidden: dict[int, torch.Tensor], row: int) -> torch.Tensor:
        return torch.cat([hidden[n][row] for n in drafter.layers], dim=1)

    ids_BT = torch.randint(0, 256, (BATCH, PROMPT), generator=draw)
    next_B, hidden = torch.randint(0, 256, (BATCH,), generator=draw), states(BATCH, PROMPT)
    drafter.begin(ids_BT, hidden, next_B)
    texts = [[*ids_BT[row].tolist(), int(next_B[row])] for row in range(BATCH)]
    past = [joined(hidden, row) for row in range(BATCH)]
    for turn in range(ROUNDS):
        proposal = drafter.propose(TOKENS, draw, 0.7)
        assert proposal.probs_BKV is not None
        for row, (text, known_TD) in enumerate(zip(texts, past, strict=True)):
            drafted = proposal.ids_BK[row].tolist()
            expected_KV = _slow_probs(head, text, known_TD, drafted)
            torch.testing.assert_close(proposal.probs_BKV[row], expected_KV, **CLOSE)
        kept_B = torch.randint(0, TOKENS + 1, (len(texts),), generator=draw)
        next_B = torch.randint(0, 256, (len(texts),), generator=draw)
        hidden = states(len(texts), 1 + TOKENS)
        drafter.keep(hidden, kept_B, next_B)
        for row, kept in enumerate(kept_B.tolist()):
            texts[row] += [*proposal.ids_BK[row, :kept].tolist(), int(next_B[row])]
            past[row] = torch.cat([past[row], joined(hidden, row)[: kept + 1]])
        if turn == 2:
            drafter.select(torch.tensor([2, 0]))
            texts, past = [texts[2], texts[0]], [past[2], past[0]]


@torch.no_grad()
def test_greedy(tmp_path: Path) -> None:
    """Temperature 0 proposes the likeliest, named by the target's ids, without a distribution."""
    head = make_head(make_target(tmp_path / "target"), known=40)
    assert head.vocabulary is not None
    drafter = Eagle3Drafter(head)
    hidden = {n: torch.randn(1, 4, head.shape.hidden_size) for n in drafter.layers}
    drafter.begin(torch.tensor([[1, 2, 3, 4]]), hidden, torch.tensor([5]))
    proposal = drafter.propose(TOKENS, None, 0.0)
    assert proposal.probs_BKV is None
    joined = torch.cat([hidden[n][0] for n in drafter.layers], dim=1)
    drafted = proposal.ids_BK[0].tolist()
    assert _slow_probs(head, [1, 2, 3, 4, 5], joined, drafted).argmax(-1).tolist() == drafted
    assert set(drafted) <= set(head.vocabulary.ids_R.tolist())


def test_decoding_is_that_of_the_target_alone(tmp_path: Path) -> None:
    """A head that knows nothing costs no token."""
    target = make_target(tmp_path / "target")
    prompts = list(torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(2)))
    drafter = Eagle3Drafter(make_head(target))
    assert (
        decode(target.model, drafter, prompts, 20, batch=3).ids == decode(target.model, None, prompts, 20).ids
    )


@torch.no_grad()
def test_bfloat16(tmp_path: Path) -> None:
    """A head in the dtype that it is served in proposes from its own rounding of the same distributions."""
    target = make_target(tmp_path / "target")
    head = make_head(target, known=100)
    ids_BT = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(2))
    hidden = target.hidden(ids_BT, head.shape.layers)
    found = []
    for _ in range(2):
        drafter = Eagle3Drafter(head)
        drafter.begin(ids_BT, hidden, torch.tensor([3, 4]))
        probs_BKV = drafter.propose(1, torch.Generator().manual_seed(0), 1.0).probs_BKV
        assert probs_BKV is not None
        assert probs_BKV.dtype == torch.float32
        found.append(probs_BKV)
        head.to(torch.bfloat16)
    # Eight bits through one layer, against probabilities of about 0.01.
    torch.testing.assert_close(found[0], found[1], rtol=0.3, atol=3e-3)
    assert not torch.equal(found[0], found[1])
