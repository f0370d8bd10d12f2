"""Training's unroll is decoding, slot by slot; its loss is the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from compressor.drafts import unroll as unroll_file
from compressor.drafts.base import LAST
from compressor.drafts.eagle3 import Eagle3Head
from compressor.drafts.unroll import DECAY, Unroll
from tests.drafts.eagle import Target, make_head, make_target, slow_logits, slow_outputs

STEPS, BATCH, LENGTH = 4, 2, 11
SLOTS = LENGTH - 2
# fp32 sums in another order, through one layer for each step.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A tiny Llama."""
    return make_target(tmp_path_factory.mktemp("models") / "target")


def _texts() -> torch.Tensor:
    return torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def _slow(head: Eagle3Head, target: Target, ids_T: torch.Tensor, slot: int) -> list[torch.Tensor]:
    """What each step puts out from a slot on, as far as the text has tokens: run one after another."""
    hidden = target.hidden(ids_T[None], head.shape.layers)
    joined = torch.cat([hidden[n][0, : slot + 1] for n in head.shape.layers], dim=1)
    states_TD = joined @ head.get_parameter("fc.weight").T
    outputs: list[torch.Tensor] = []
    for step in range(STEPS):
        ids = ids_T[1 : slot + step + 2].tolist()
        if slot + 2 + step > LENGTH - 1:
            break
        outputs.append(slow_outputs(head, ids, states_TD)[-1])
        states_TD = torch.cat([states_TD, outputs[-1][None]])
    return outputs


@pytest.mark.parametrize("before", [True, False])
def test_equals_running_the_head(target: Target, before: bool) -> None:
    """Every step at every slot, whatever the residual stream starts with."""
    head, ids_BT = make_head(target, before=before), _texts()
    with torch.no_grad():
        outputs = Unroll(head, STEPS).unrolled(ids_BT, target.hidden(ids_BT, head.shape.layers))
        compared = 0
        for row in range(BATCH):
            for slot in range(SLOTS):
                for step, out_D in enumerate(_slow(head, target, ids_BT[row], slot)):
                    torch.testing.assert_close(outputs[step][row, slot], out_D, **CLOSE)
                    compared += 1
    assert compared == BATCH * sum(SLOTS - step for step in range(STEPS))


@pytest.mark.parametrize("known", [None, 100])
def test_loss(target: Target, known: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL, accepted tokens and gradients are those of a plain computation, a token at a time."""
    monkeypatch.setitem(unroll_file.CHUNK_LOGITS, "cpu", 256 * 5)
    head, ids_BT = make_head(target, known=known), _texts()
    weight_BT = (torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(1)) > 0.3).float()
    losses = Unroll(head, STEPS)(ids_BT, target.hidden(ids_BT, head.shape.layers), weight_BT)
    losses.loss.backward()
    fast = {name: parameter.grad for name, parameter in head.named_parameters()}
    head.zero_grad(set_to_none=True)
    with torch.no_grad():
        logits_BTV = target.model(ids_BT, use_cache=False).logits
    kl, accepted, tokens = ([torch.zeros(()) for _ in range(STEPS)] for _ in range(3))
    for row in range(BATCH):
        for slot in range(SLOTS):
            right = True
            for step, out_D in enumerate(_slow(head, target, ids_BT[row], slot)):
                logits_V, weight = logits_BTV[row, slot + 1 + step], weight_BT[row, slot + 2 + step]
                kept = slice(None) if head.vocabulary is None else head.vocabulary.ids_R
                logits_R = slow_logits(head, out_D)
                one = kl_div(logits_R.log_softmax(-1), logits_V[kept].softmax(-1), reduction="sum")
                likeliest = int(torch.arange(256)[kept][logits_R.argmax()])
                right &= likeliest == int(logits_V.argmax())
                kl[step] = kl[step] + one * weight
                accepted[step] += weight * right
                tokens[step] += weight
    loss = sum(DECAY**step * kl[step] / tokens[step] for step in range(STEPS))
    assert isinstance(loss, torch.Tensor)
    torch.testing.assert_close(losses.loss, loss, **CLOSE)
    torch.testing.assert_close(losses.kl_K, torch.stack(kl), **CLOSE)
    assert losses.accepted_K.tolist() == torch.stack(accepted).tolist()
    assert losses.tokens_K.tolist() == torch.stack(tokens).tolist()
    loss.backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(fast[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_accepts_what_is_right(target: Target) -> None:
    """A head that says what the target says is accepted; after its first fault nothing is."""
    head, ids_BT = make_head(target), _texts()
    hidden = target.hidden(ids_BT, head.shape.layers)
    rows_BSD = hidden[LAST][:, 1:-1]
    unroll = Unroll(head, 3)
    wrong = rows_BSD.roll(1, dims=-1)
    third = (torch.arange(SLOTS) % 3 == 0)[:, None]
    right = [rows_BSD, rows_BSD.roll(-1, 1), rows_BSD.roll(-2, 1)]
    for outputs, slots in (
        (right, [9, 8, 7]),
        ([right[0], wrong, right[2]], [9, 0, 0]),
        # Slots 0, 3 and 6.
        ([torch.where(third, right[0], wrong), *right[1:]], [3, 3, 3]),
        ([right[0], torch.where(third, right[1], wrong.roll(-1, 1)), right[2]], [9, 3, 3]),
    ):
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            # What the target's head reads is normed already: the norm is left out.
            patch.setitem(head._modules, "norm", torch.nn.Identity())
            patch.setattr(unroll, "unrolled", lambda *_, given=outputs: given)
            losses = unroll(ids_BT, hidden)
        assert losses.accepted_K.tolist() == [BATCH * count for count in slots]


def test_padding_changes_nothing(target: Target) -> None:
    """Tokens behind a text, of weight 0, leave its loss as it is."""
    head, ids_BT = make_head(target), _texts()
    longer_BT = torch.cat([ids_BT, torch.full((BATCH, 5), 7)], dim=1)
    weight_BT = torch.ones_like(longer_BT).float()
    weight_BT[:, LENGTH:] = 0
    unroll = Unroll(head, 3)
    with torch.no_grad():
        short = unroll(ids_BT, target.hidden(ids_BT, head.shape.layers))
        long = unroll(longer_BT, target.hidden(longer_BT, head.shape.layers), weight_BT)
    torch.testing.assert_close(long.kl_K, short.kl_K, **CLOSE)
    assert long.tokens_K.tolist() == short.tokens_K.tolist() == [18, 16, 14]


def test_the_target_is_not_trained(tmp_path: Path) -> None:
    """Shared tensors get no gradient, and are no parameters of the head."""
    target = make_target(tmp_path / "target")
    head = make_head(target)
    ids_BT = _texts()
    Unroll(head, 2)(ids_BT, target.hidden(ids_BT, head.shape.layers)).loss.backward()
    assert all(parameter.grad is None for parameter in target.model.parameters())
    assert set(dict(head.named_parameters())) == set(head.shape.tensors())
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("known", [None, 100])
def test_autocast(target: Target, known: int | None) -> None:
    """Products in bfloat16 give the fp32 gradient but for rounding; parameters stay fp32."""
    head, ids_BT = make_head(target, known=known), _texts()
    hidden = target.hidden(ids_BT, head.shape.layers)
    found = []
    for enabled in (False, True):
        head.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = Unroll(head, 3)(ids_BT, hidden).loss
        loss.backward()
        grads = [parameter.grad for parameter in head.parameters()]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        found.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99
