"""Which proposed tokens stay: greedy, or by rejection, which keeps the target's distribution exactly.

Legend: B sequences, K proposed tokens, P = K + 1 places that the target gives logits for, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from compressor.drafts.base import Proposal


def verify(
    logits_BPV: torch.Tensor, proposal: Proposal, temperature: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many proposed tokens stay [B], and the target's own token after them [B].

    Greedy: the tokens up to the first that is not the target's likeliest. Sampling: token x, drawn from q,
    stays with probability min(1, p(x) / q(x)); the first that does not is replaced by a draw from
    max(p - q, 0), scaled to one; after K that stay one more is drawn from p (Leviathan, Kalman and Matias,
    arXiv 2211.17192, algorithm 1). A proposal without ``probs_BKV`` has q(x) = 1.

    Args:
        logits_BPV: of the target: place i follows the last token and i proposed ones.
        proposal: of K tokens.
        temperature: 0 for greedy, else what logits are divided by.
        generator: of the draws, on the logits' device.
    """
    import torch

    ids_BK = proposal.ids_BK
    if temperature == 0:
        own_BP = logits_BPV.argmax(-1)
        kept_B = _leading(own_BP[:, :-1] == ids_BK)
        return kept_B, own_BP.gather(1, kept_B[:, None])[:, 0]
    p_BPV = (logits_BPV / temperature).softmax(-1)
    q_BKV = proposal.probs_BKV
    if q_BKV is None:
        q_BKV = torch.zeros_like(p_BPV[:, :-1]).scatter_(2, ids_BK[:, :, None], 1.0)
    p_BK = p_BPV[:, :-1].gather(2, ids_BK[:, :, None])[..., 0]
    q_BK = q_BKV.gather(2, ids_BK[:, :, None])[..., 0]
    # In [0, 1): a token with p >= q always stays, one with p = 0 never.
    chance_BK = torch.rand(ids_BK.shape, generator=generator, device=p_BK.device)
    kept_B = _leading(chance_BK * q_BK < p_BK)
    left_BPV = torch.cat([(p_BPV[:, :-1] - q_BKV).clamp_min(0), p_BPV[:, -1:]], dim=1)
    rows_B = torch.arange(len(kept_B), device=kept_B.device)
    left_BV = left_BPV[rows_B, kept_B]
    # Nothing is left where p and q differ by rounding alone.
    left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BPV[rows_B, kept_B])
    return kept_B, torch.multinomial(left_BV, 1, generator=generator)[:, 0]


def pick(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """The likeliest token of each row [B], or a draw."""
    import torch

    if temperature == 0:
        return logits_BV.argmax(-1)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _leading(yes_BK: torch.Tensor) -> torch.Tensor:
    """How many are true before the first that is not [B]."""
    return yes_BK.int().cumprod(dim=1).sum(dim=1)
