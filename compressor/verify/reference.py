"""What the numbers should be: prompt log-probabilities and greedy tokens, by transformers in float32.

Legend: T tokens of a window, P some of its positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.evals.head import logits_at, plain_head
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 256


@quiet()
def prompt_logprobs(
    model: PreTrainedModel, windows: Sequence[Sequence[int]]
) -> tuple[tuple[float, ...], ...]:
    """log p(token t | tokens before t), nats, for t = 1, 2, ... of each window; float32."""
    import torch

    found = []
    plain = plain_head(model, torch.tensor(windows[0]))
    for window in windows:
        ids_T = torch.tensor(window)
        at = logits_at(model, ids_T, plain=plain)
        parts = []
        for positions_P in torch.split(torch.arange(len(window) - 1), _CHUNK):
            logprobs_PV = at(positions_P).log_softmax(-1)
            parts.append(logprobs_PV.gather(1, ids_T[positions_P + 1, None].to(logprobs_PV.device))[:, 0])
        found.append(tuple(torch.cat(parts).tolist()))
    return tuple(found)


@quiet()
def greedy_tokens(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """The most likely continuation of each prompt, token by token; an end token does not end it."""
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        chosen: list[int] = []
        past = None
        with torch.inference_mode():
            while len(chosen) < new_tokens:
                out = model(ids, past_key_values=past, use_cache=True)
                past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                chosen.append(int(ids))
        found.append(tuple(chosen))
    return tuple(found)
