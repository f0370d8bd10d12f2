"""The drafter and the unroll against every slot computed again for every step, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.drafts.base import LAST, Drafter, Head, Rows
from compressor.drafts.native import NativeHead, seen_in_step
from compressor.drafts.native_drafter import NativeDrafter

from .native_models import chain, hidden_of, opened, whole_pass

STEPS = 3
# fp32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "glm4_moe", "deepseek_v3"])
def test_proposals_are_those_of_a_whole_pass(name: str, tmp_path: Path) -> None:
    """After a prompt, after sequences have kept 0, 2 and 3 of what was proposed, and after one has left."""
    _, target, layer = opened(name, tmp_path)
    torch.manual_seed(2)
    drafter: Drafter = NativeDrafter(layer)
    texts = torch.randint(0, 250, (3, 24))
    ids = [row[:6] for row in texts]
    hidden_BTD = hidden_of(target, texts[:, :5])
    states = list(hidden_BTD)
    drafter.begin(texts[:, :5], {LAST: hidden_BTD}, texts[:, 5])
    for kept_B in ([0, 2, 3], [3, 0, 1]):
        proposed_BK = drafter.propose(STEPS, None, 0.0).ids_BK
        for row, (tokens, state) in enumerate(zip(ids, states, strict=True)):
            expected = [int(logits.argmax()) for logits in chain(layer, tokens, state, STEPS)]
            assert proposed_BK[row].tolist() == expected, (name, row)
        # What the target would make of the last token and the proposal does not matter to the drafter.
        made_BTD = torch.randn(len(ids), 1 + STEPS, hidden_BTD.shape[-1])
        next_B = torch.randint(0, 250, (len(ids),))
        for row, kept in enumerate(kept_B):
            ids[row] = torch.cat([ids[row], proposed_BK[row, :kept], next_B[row : row + 1]])
            states[row] = torch.cat([states[row], made_BTD[row, : kept + 1]])
        drafter.keep({LAST: made_BTD}, torch.tensor(kept_B), next_B)
    drafter.select(torch.tensor([2, 0]))
    proposed_BK = drafter.propose(STEPS, None, 0.0).ids_BK
    for row, which in enumerate((2, 0)):
        expected = [int(logits.argmax()) for logits in chain(layer, ids[which], states[which], STEPS)]
        assert proposed_BK[row].tolist() == expected


def test_sampled_proposals_come_with_their_distributions(tmp_path: Path) -> None:
    """The first is the whole pass's at the temperature; equal seeds draw equal tokens."""
    _, target, layer = opened("qwen3_next", tmp_path)
    ids_1T = torch.randint(0, 250, (1, 7), generator=torch.Generator().manual_seed(3))
    hidden_1TD = hidden_of(target, ids_1T[:, :6])
    drawn = []
    for _ in range(2):
        drafter = NativeDrafter(layer)
        drafter.begin(ids_1T[:, :6], {LAST: hidden_1TD}, ids_1T[:, 6])
        drawn.append(drafter.propose(STEPS, torch.Generator().manual_seed(4), 0.7))
    assert torch.equal(drawn[0].ids_BK, drawn[1].ids_BK)
    probs = drawn[0].probs_BKV
    assert probs is not None
    assert probs.shape == (1, STEPS, 256)
    _, logits_V = whole_pass(layer, ids_1T[0, 1:], hidden_1TD[0])
    torch.testing.assert_close(probs[0, 0], (logits_V / 0.7).softmax(0), **CLOSE)


@pytest.mark.parametrize("name", ["qwen3_next", "glm4_moe"])
def test_unroll_is_a_chain_from_every_place(name: str, tmp_path: Path) -> None:
    """Losses and accepted tokens against a pass of its own for each place and step; uncounted places."""
    _, target, layer = opened(name, tmp_path)
    torch.manual_seed(5)
    ids_BT = torch.randint(0, 250, (2, 10))
    hidden_BTD = hidden_of(target, ids_BT)
    counted_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    counted_BT[0, 2] = counted_BT[1, 7:] = False
    head: Head = NativeHead(layer, decay=0.5)
    found = head.unroll(Rows(ids_BT, {LAST: hidden_BTD}, counted_BT), STEPS)
    wanted = [torch.zeros(()) for _ in range(STEPS)]
    accepted, places = [0] * STEPS, 0
    own_BTV = target.lm_head(hidden_BTD).log_softmax(-1)
    for row in range(2):
        for place in range(10 - STEPS):
            if not all(counted_BT[row, place + ahead] for ahead in range(STEPS + 1)):
                continue
            places += 1
            tokens, states = ids_BT[row, 1 : place + 2], hidden_BTD[row, : place + 1]
            right = True
            for step in range(STEPS):
                recycled_D, logits_V = whole_pass(layer, tokens, states)
                own_V = own_BTV[row, place + 1 + step]
                wanted[step] += (own_V.exp() * (own_V - logits_V.log_softmax(0))).sum()
                right = right and bool(own_V.argmax() == logits_V.argmax())
                accepted[step] += right
                tokens = ids_BT[row, 1 : place + 3 + step]
                states = torch.cat([states, recycled_D[None]])
    assert found.places == places == 4 + 4
    assert found.accepted_K.tolist() == accepted
    torch.testing.assert_close(found.losses_K, torch.stack(wanted), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        found.loss.item(), sum(float(wanted[k]) * 0.5**k for k in range(STEPS)), **CLOSE
    )


def test_training_brings_the_layer_to_its_target(tmp_path: Path) -> None:
    """Every parameter that a token reaches has a gradient, and a few steps bring the loss down."""
    _, target, layer = opened("qwen3_next", tmp_path)
    head = NativeHead(layer)
    ids_BT = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(6))
    rows = Rows(ids_BT, {LAST: hidden_of(target, ids_BT)}, torch.ones_like(ids_BT, dtype=torch.bool))
    for parameter in head.trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.trained.values(), lr=3e-3)
    losses = []
    for _ in range(12):
        found = head.unroll(rows, 2)
        optimizer.zero_grad()
        (found.loss / found.places).backward()
        assert all(parameter.grad is not None for parameter in head.trained.values())
        optimizer.step()
        losses.append(float(found.loss.detach()) / found.places)
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in target.parameters())
    changed = head.tensors()
    assert not torch.equal(changed["mtp.fc.weight"], layer_source(tmp_path)["mtp.fc.weight"])


def layer_source(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors as stored."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_places_of_later_steps_see_their_own_chain_only() -> None:
    """The mask, spelt out."""
    expected = [[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert seen_in_step(3, 1, torch.device("cpu"))[0].int().tolist() == expected
