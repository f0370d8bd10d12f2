"""How long greedy continuations with a KV-cache format stay those with a 16-bit cache.

Legend: R texts at once, T tokens of a prompt, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.evals.kv_feed import KvVariant, MakeCache, Mode, feed, fitting_chunk, step, texts_at_once
from compressor.evals.kv_record import GenerationResult
from compressor.evals.text import vocabulary_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressor.progress import Progress


def compare_generation(
    model: PreTrainedModel,
    prompts_RT: torch.Tensor,
    new_tokens: int,
    variants: Sequence[KvVariant],
    usual: MakeCache,
    *,
    chunk: int,
    mode: Mode,
    progress: Progress,
) -> list[GenerationResult]:
    """Greedy continuations of the same prompts; an end of text is a token like others.

    In mode ``vllm`` a prompt is one raw chunk.
    """
    import torch

    chunk = fitting_chunk(chunk, vocabulary_size(model))
    length = prompts_RT.shape[1]
    prefill = length if mode == "vllm" else 0

    def continuations(make: MakeCache) -> torch.Tensor:
        parts = []
        for part_RT in torch.split(prompts_RT, texts_at_once(length + new_tokens, chunk)):
            parts.append(_greedy(model, part_RT, make(), new_tokens, chunk, prefill))
            progress.advance(len(part_RT) * (length + new_tokens))
        return torch.cat(parts)

    usual_RN = continuations(usual)
    return [agreement(usual_RN, continuations(variant.make)) for variant in variants]


def agreement(usual_RN: torch.Tensor, other_RN: torch.Tensor) -> GenerationResult:
    """Token ids of two sets of continuations, side by side."""
    rows, new_tokens = usual_RN.shape
    same_RN = usual_RN == other_RN
    until_R = same_RN.int().cumprod(dim=1).sum(dim=1)
    return GenerationResult(
        prompts=rows,
        new_tokens=new_tokens,
        until_divergence=float(until_R.double().mean()),
        agreeing=float(same_RN.double().mean()),
        identical=float((until_R == new_tokens).double().mean()),
    )


def _greedy(
    model: PreTrainedModel, prompts_RT: torch.Tensor, cache: object, new_tokens: int, chunk: int, prefill: int
) -> torch.Tensor:
    """Ids [R, N]."""
    import torch

    wanted = prompts_RT.shape[1]
    for _, logits_RPV in feed(model, prompts_RT, cache, chunk, prefill=prefill, wanted=wanted):
        last_R = logits_RPV[:, -1].argmax(-1)
    made = [last_R]
    while len(made) < new_tokens:
        made.append(step(model, made[-1][:, None], cache)[:, -1].argmax(-1))
    return torch.stack(made, dim=1).cpu()
