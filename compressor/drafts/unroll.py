"""Training as decoding: K steps of an EAGLE-3 head at every slot of a text at once, and their loss.

Training-time test of EAGLE-3 (arXiv 2503.01840, section 3.2): step k takes what step k - 1 put out at the
same slot for its hidden state, and the text's next token. It attends to the slots up to its own as step 0
made them, of which decoding has nothing else either, and to what the steps in between made at its own slot.

Slot i holds token i + 1 and the hidden states of token i; step k stands at position i + k, takes token
i + 1 + k, and foretells token i + 2 + k, for which the target's distribution is that behind token i + 1 + k.

Legend: B sequences, T tokens, S slots (T - 2), K steps, N slots of all sequences, P some of these, D hidden
size, H heads, G heads of keys and values, E dimensions of a head, V vocabulary of the target, R of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear, pad

from compressor.drafts.base import LAST
from compressor.drafts.eagle3 import Eagle3Head, Projected
from compressor.drafts.spec import CHUNK_LOGITS

DECAY = 0.8


class Losses(NamedTuple):
    """What an unroll comes to.

    Attributes:
        loss: to be differentiated: the sum of each step's mean KL times ``decay ** k``, nats.
        kl_K: the sum over tokens of each step's KL, nats.
        accepted_K: for how many tokens this and all steps before, from one slot, named the target's likeliest
            token: what greedy decoding would accept of a text that the target wrote so.
        tokens_K: how many tokens (their weights) each step foretold.
    """

    loss: torch.Tensor
    kl_K: torch.Tensor
    accepted_K: torch.Tensor
    tokens_K: torch.Tensor


class Unroll(nn.Module):
    """A head and its loss as one module, so that data-parallel wrappers see one forward.

    Args:
        head: its parameters are this module's.
        steps: K.
        decay: how much less each step counts than the one before.
    """

    def __init__(self, head: Eagle3Head, steps: int, decay: float = DECAY) -> None:
        super().__init__()
        assert steps > 0
        self.head = head
        self._steps, self._decay = steps, decay

    def forward(
        self,
        ids_BT: torch.Tensor,
        hidden: Mapping[int, torch.Tensor],
        weight_BT: torch.Tensor | None = None,
    ) -> Losses:
        """The losses of texts that the target has read.

        Args:
            ids_BT: token ids; T at least K + 2. Padding goes behind a text.
            hidden: the target's hidden states [B, T, D] by layer: those that the head reads, and ``LAST``.
            weight_BT: 1 for tokens that are to be foretold, 0 for others (padding, prompts); None for 1.
        """
        batch, length = ids_BT.shape
        slots = length - 2
        assert slots >= self._steps, f"{length} tokens are too few for {self._steps} steps"
        outputs = self.unrolled(ids_BT, hidden)
        # Row u of step k is slot u - k: rows of one u are judged by one distribution of the target.
        rows_KND = torch.stack(
            [pad(out[:, : slots - k], (0, 0, k, 0)).flatten(0, 1) for k, out in enumerate(outputs)]
        )
        weight_BS = torch.ones_like(ids_BT, dtype=torch.float32) if weight_BT is None else weight_BT.float()
        weight_BS = weight_BS[:, 2:].to(rows_KND.device)
        valid_KS = torch.ones(self._steps, slots, device=rows_KND.device).triu()
        weight_KN = (valid_KS[:, None] * weight_BS).flatten(1)
        tokens_K = weight_KN.sum(dim=1)
        decay_K = self._decay ** torch.arange(self._steps, device=rows_KND.device)
        normed_KND = self.head.norm(rows_KND)
        loss, kl_K, same_KN = _ChunkedKl.apply(  # type: ignore[no-untyped-call]
            normed_KND,
            self.head.output_RD,
            hidden[LAST][:, 1:-1].flatten(0, 1).to(rows_KND.device),
            self.head.target_output_VD,
            None if self.head.vocabulary is None else self.head.vocabulary.ids_R.to(rows_KND.device),
            weight_KN,
            decay_K / tokens_K.clamp(min=1),
        )
        same_KBS = same_KN.unflatten(1, (batch, slots))
        accepted = []
        so_far_BS = torch.ones_like(same_KBS[0])
        for k in range(self._steps):
            # Step k's row u belongs to the slot of step k - 1's row u - 1.
            so_far_BS = same_KBS[k] if k == 0 else same_KBS[k] & pad(so_far_BS[:, :-1], (1, 0))
            accepted.append((so_far_BS.flatten() * weight_KN[k]).sum())
        return Losses(loss, kl_K, torch.stack(accepted), tokens_K)

    def unrolled(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """What each step puts out before the last norm, [B, S, D]; step k's last k slots mean nothing."""
        slots = ids_BT.shape[1] - 2
        ids_BT = ids_BT.to(self.head.device)
        state_BSD = self.head.combine({n: hidden[n][:, :slots] for n in self.head.shape.layers})
        place_1S = torch.arange(slots, device=self.head.device)[None]
        made: list[Projected] = []
        outputs = []
        for step in range(self._steps):
            tokens_BS = pad(ids_BT[:, 1 + step : 1 + step + slots], (0, max(0, step - 1)))
            made.append(self.head.project(tokens_BS, state_BSD, place_1S + step))
            state_BSD = self.head.finish(_attend(made), made[-1].residual_BTD)
            outputs.append(state_BSD)
        return outputs


def _attend(made: list[Projected]) -> torch.Tensor:
    """[B, H, S, E] of the last step: to step 0's slots up to its own, and to later steps' own slot."""
    query_BHSE = made[-1].query_BHTE
    heads, dims = query_BHSE.shape[1], query_BHSE.shape[-1]

    def spread(of_heads: torch.Tensor) -> torch.Tensor:
        return of_heads.repeat_interleave(heads // of_heads.shape[1], dim=1)

    keys, values = [spread(one.key_BGTE) for one in made], [spread(one.value_BGTE) for one in made]
    ahead_SS = torch.ones(query_BHSE.shape[2], query_BHSE.shape[2], device=query_BHSE.device).triu(1).bool()
    first = (query_BHSE @ keys[0].transpose(-1, -2)).float().masked_fill(ahead_SS, float("-inf"))
    own = [(query_BHSE * key).float().sum(-1, keepdim=True) for key in keys[1:]]
    shares = (torch.cat([first, *own], dim=-1) / dims**0.5).softmax(-1).to(query_BHSE.dtype)
    slots = ahead_SS.shape[0]
    attended_BHSE: torch.Tensor = shares[..., :slots] @ values[0]
    for step, value in enumerate(values[1:]):
        attended_BHSE = attended_BHSE + shares[..., slots + step, None] * value
    return attended_BHSE


class _ChunkedKl(torch.autograd.Function):
    """KL of every step to the target, whose gradients are computed chunk by chunk on the way forward.

    No logits are kept. The target's distribution is that over the tokens which the head knows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_KND: torch.Tensor,
        output_RD: torch.Tensor,
        target_ND: torch.Tensor,
        target_VD: torch.Tensor,
        known_R: torch.Tensor | None,
        weight_KN: torch.Tensor,
        factor_K: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, the KL of each step in all, and where the likeliest tokens are the same."""
        wanted = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(rows_KND.dtype, output_RD.dtype) if wanted[1] else output_RD.dtype
        flat_RD = output_RD.detach().to(dtype)
        steps, rows, _ = rows_KND.shape
        rows_grad = torch.zeros_like(rows_KND) if wanted[0] else None
        output_grad = torch.zeros_like(output_RD, dtype=torch.float32) if wanted[1] else None
        kl_K = torch.zeros(steps, device=rows_KND.device)
        same_KN = torch.zeros(steps, rows, dtype=torch.bool, device=rows_KND.device)
        chunk = max(1, CHUNK_LOGITS[rows_KND.device.type] // len(target_VD))
        for start in range(0, rows, chunk):
            here = slice(start, start + chunk)
            logits_PV = linear(target_ND[here].detach().to(target_VD.dtype), target_VD).float()
            likeliest_P = logits_PV.argmax(-1)
            goal_PR = (logits_PV if known_R is None else logits_PV[:, known_R]).log_softmax(-1)
            for k in range(steps):
                part_PD = rows_KND[k, here].detach().to(dtype)
                log_PR = linear(part_PD, flat_RD).float().log_softmax(-1)
                best_P = log_PR.argmax(-1)
                same_KN[k, here] = (best_P if known_R is None else known_R[best_P]) == likeliest_P
                weight_P1 = weight_KN[k, here, None]
                kl_K[k] += (goal_PR.exp() * (goal_PR - log_PR) * weight_P1).sum()
                slope_PR = ((log_PR.exp() - goal_PR.exp()) * weight_P1 * factor_K[k]).to(dtype)
                if rows_grad is not None:
                    rows_grad[k, here] = (slope_PR @ flat_RD).to(rows_grad.dtype)
                if output_grad is not None:
                    output_grad += (slope_PR.T @ part_PD).float()
        ctx.save_for_backward(rows_grad, output_grad)
        ctx.output_dtype = output_RD.dtype
        ctx.mark_non_differentiable(kl_K, same_KN)
        return (kl_K * factor_K).sum(), kl_K, same_KN

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times that of the loss."""
        rows_grad, output_grad = ctx.saved_tensors
        rows = None if rows_grad is None else rows_grad * gradients[0]
        output = None if output_grad is None else (output_grad * gradients[0]).to(ctx.output_dtype)
        return rows, output, None, None, None, None, None
