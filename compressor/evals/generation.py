"""How long greedy continuations by the result stay those by the source.

Legend: T tokens of a prompt, L tokens of the text, R prompts, N new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.evals.decode import decode
from compressor.evals.kv_generation import agreement
from compressor.evals.units import CONFIDENCE
from compressor.model.quiet import quiet
from compressor.numerics.paired import Interval, ratio_interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressor.evals.base import GenerationSpec
    from compressor.progress import Progress

_BATCH = 8


@dataclass(frozen=True)
class GenerationAgreement:
    """Source against result; an end of text is a token like others.

    Attributes:
        prompts: how many.
        prompt_tokens: of each.
        new_tokens: of each continuation.
        until_divergence: mean number of tokens before the first that differs; ``new_tokens`` where none does.
        until_divergence_ci95: its interval over prompts, or None where they are too few.
        agreeing: fraction of all generated tokens that are the same at the same place.
        identical: fraction of prompts whose continuations are the same to the end.
        lengths: of each prompt, tokens before the first that differs.
        dtype: that both computed in.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    until_divergence: float
    until_divergence_ci95: Interval | None
    agreeing: float
    identical: float
    lengths: tuple[int, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return dict(vars(self))


@quiet()
def compare_continuations(
    source_model: PreTrainedModel,
    result_model: PreTrainedModel,
    ids_L: torch.Tensor,
    spec: GenerationSpec,
    progress: Progress,
    *,
    first: int | None = None,
    seed: int = 0,
) -> GenerationAgreement:
    """Continues places of a text by both models.

    Args:
        source_model: in evaluation mode, on its device, in the dtype to compute in.
        result_model: the same.
        ids_L: of the text; where it is short, prompts are fewer.
        spec: how many prompts, and how long.
        progress: told the continuations.
        first: a token put before every prompt (``<bos>``), or None; counted in ``prompt_tokens``.
        seed: of the interval.

    Raises:
        UserError: prompts and continuations are longer than a model reads.
        CheckpointError: NaN logits.
    """
    import torch

    prompts = evenly(ids_L, spec.prompts, spec.prompt_tokens, first)
    progress.start("continuations", 2 * len(prompts), "items")
    continued = []
    for model in (source_model, result_model):
        found = decode(model, None, prompts, spec.new_tokens, batch=_BATCH)
        continued.append(torch.tensor(found.ids))
        progress.advance(len(prompts))
    progress.finish()
    source_RN, result_RN = continued
    figures = agreement(source_RN, result_RN)
    lengths = (source_RN == result_RN).int().cumprod(dim=1).sum(dim=1).tolist()
    return GenerationAgreement(
        prompts=len(prompts),
        prompt_tokens=len(prompts[0]),
        new_tokens=spec.new_tokens,
        until_divergence=figures.until_divergence,
        until_divergence_ci95=_interval(lengths, spec.new_tokens, seed),
        agreeing=figures.agreeing,
        identical=figures.identical,
        lengths=tuple(lengths),
        dtype=str(source_model.dtype).removeprefix("torch."),
    )


def _interval(lengths: list[int], most: int, seed: int) -> Interval | None:
    """Of the mean, which is neither negative nor longer than the continuations."""
    found = ratio_interval(lengths, [1.0] * len(lengths), CONFIDENCE, seed)
    return found and (max(0.0, found[0]), min(float(most), found[1]))


def evenly(ids_L: torch.Tensor, prompts: int, tokens: int, first: int | None) -> list[torch.Tensor]:
    """Stretches [T] of a text without overlap, evenly spaced, each after the token ``first``, if any.

    At most ``prompts``, and as many as the text holds; one, of fewer tokens, where it holds none.
    """
    import torch

    ahead_T = ids_L.new_tensor([] if first is None else [first])
    own = max(1, tokens - len(ahead_T))
    count = max(1, min(prompts, len(ids_L) // own))
    room = max(0, len(ids_L) - own)
    starts = [number * room // max(1, count - 1) if count > 1 else 0 for number in range(count)]
    return [torch.cat([ahead_T, ids_L[start : start + own]]) for start in starts]
