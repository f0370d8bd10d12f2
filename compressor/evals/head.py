"""The vocabulary projection, a few positions at a time.

Logits of a whole window are [tokens, vocabulary]: 1.6 GB in float32 for 2,048 tokens and 200,000 words.

Legend: T tokens, D hidden size, P some of the positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_TOKENS = 4

# Positions [P] of the window -> logits [P, V] in float32.
LogitsAt = Callable[["torch.Tensor"], "torch.Tensor"]


def plain_head(model: PreTrainedModel, ids_T: torch.Tensor) -> bool:
    """Whether the model's logits are its output embedding times its last hidden state and nothing else.

    Tried on a few tokens of ``ids_T``, because families differ (soft caps, logit scales) and no attribute
    says so for all of them.
    """
    import torch

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return False
    probe_1T = ids_T[None, :PROBE_TOKENS].to(model.device)
    with torch.inference_mode():
        own = model(probe_1T, use_cache=False).logits
        hidden = decoder(probe_1T, use_cache=False)[0]
        return hidden.shape[-1] == head.weight.shape[-1] and torch.equal(head(hidden).float(), own.float())


def logits_at(model: PreTrainedModel, ids_T: torch.Tensor, *, plain: bool) -> LogitsAt:
    """Runs the model over ``ids_T`` once and returns what gives its logits at chosen positions.

    Where the head is not plain, each call runs the model again and keeps only the positions asked for.
    """
    import torch

    ids_1T = ids_T[None].to(model.device)
    if not plain:

        def again(positions_P: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                kept = model(ids_1T, use_cache=False, logits_to_keep=positions_P.to(model.device))
                logits_PV: torch.Tensor = kept.logits[0].float()
                return logits_PV

        return again

    head = model.get_output_embeddings()
    with torch.inference_mode():
        hidden_TD = model.get_decoder()(ids_1T, use_cache=False)[0][0]

    def project(positions_P: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits_PV: torch.Tensor = head(hidden_TD[positions_P.to(hidden_TD.device)]).float()
            return logits_PV

    return project
