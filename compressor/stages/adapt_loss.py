"""The loss of a long sequence: hidden states to next-token losses, without logits of all tokens at once.

Legend: B sequences, T tokens, N tokens of all, P some of them, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from compressor.errors import CheckpointError
from compressor.stages.adapt_memory import CHUNK_LOGITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 8
# bfloat16 logits that are rounded before and after a factor or a cap, over the largest.
_SAME = 0.02

# What follows the projection: fp32 [P, V] -> fp32 [P, V].
Finish = Callable[[torch.Tensor], torch.Tensor]


class SequenceLoss(nn.Module):
    """A causal model and its head as one module, so that data-parallel wrappers see one forward.

    Args:
        model: computes hidden states; its parameters are this module's.
        dtype: that matrices are multiplied in.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype
        self._finish = finish_of(model)

    def forward(
        self, ids_BT: torch.Tensor, weight_BT: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 scalars, nats: negative log-likelihoods of all tokens but each sequence's first, summed.

        First with a weight for each token (by default 1), to be differentiated; then without.
        """
        hidden_BTD = self.model.get_decoder()(input_ids=ids_BT, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        hidden_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
        weight_N = None if weight_BT is None else weight_BT[:, 1:].reshape(-1)
        weighted, plain = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head.weight, head.bias, ids_BT[:, 1:].reshape(-1), weight_N, self._finish, self._dtype
        )
        return weighted, plain


class _ChunkedLoss(torch.autograd.Function):
    """Sums of cross-entropies, whose gradients are computed chunk by chunk on the way forward.

    The loss is the last thing computed, so its gradients are known up to a factor as soon as a chunk's logits
    are: no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_N: torch.Tensor,
        weight_N: torch.Tensor | None,
        finish: Finish,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        wanted = ctx.needs_input_grad[:2]
        flat_VD = weight_VD.detach().to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        plain = torch.zeros_like(total)
        hidden_grad = torch.empty_like(hidden_ND) if wanted[0] else None
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        chunk = max(1, CHUNK_LOGITS[hidden_ND.device.type] // len(weight_VD))
        for start in range(0, len(hidden_ND), chunk):
            here = slice(start, start + chunk)
            part_PD = hidden_ND[here].detach().to(dtype)
            raw_PV = linear(part_PD, flat_VD, None if bias_V is None else bias_V.detach().to(dtype))
            with torch.enable_grad():
                raw_PV.requires_grad_(any(wanted))
                nll_P = cross_entropy(finish(raw_PV.float()), ids_N[here], reduction="none")
                loss = nll_P.sum() if weight_N is None else (nll_P * weight_N[here]).sum()
            total += loss.detach()
            plain += nll_P.detach().sum()
            if not any(wanted):
                continue
            (slope_PV,) = torch.autograd.grad(loss, raw_PV)
            if hidden_grad is not None:
                hidden_grad[here] = slope_PV @ flat_VD
            if weight_grad is not None:
                # Chunks are added in fp32: their sum is over all tokens.
                weight_grad += slope_PV.T @ part_PD
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times that of the weighted loss."""
        hidden_grad, weight_grad = ctx.saved_tensors
        factor = gradients[0]
        hidden = None if hidden_grad is None else hidden_grad * factor
        weight = None if weight_grad is None else (weight_grad * factor).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None, None


def finish_of(model: PreTrainedModel) -> Finish:
    """What the model does to the output of its head: nothing, a factor, or a soft cap.

    Told from its own logits of a few tokens, because no attribute says so for all families.

    Raises:
        CheckpointError: it does something else, or has no head.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    where = type(model).__name__
    if decoder is None or decoder is model or head is None:
        raise CheckpointError("its head cannot be told apart: no loss can be computed in chunks", where=where)
    ids_1T = torch.arange(1, 1 + _PROBE_TOKENS, device=model.device)[None]
    with torch.no_grad():
        own = model(ids_1T, use_cache=False).logits.float()
        raw = head(decoder(ids_1T, use_cache=False)[0]).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    factor = float((own * raw).sum() / (raw * raw).sum().clamp(min=torch.finfo(torch.float32).tiny))
    choices: list[Finish] = [lambda x: x, lambda x: x * factor]
    if cap:
        choices.insert(0, lambda x: torch.tanh(x / cap) * cap)
    for choice in choices:
        if float((choice(raw) - own).abs().max()) <= _SAME * float(own.abs().max()):
            return choice
    raise CheckpointError("does more to its logits than a factor or a soft cap", where=where)
