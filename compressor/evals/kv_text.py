"""Perplexity, KL and agreement of a model with a KV-cache format against itself with a 16-bit cache.

Legend: T tokens, R windows at once, P tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from compressor.errors import UserError
from compressor.evals.base import TextResult
from compressor.evals.kv_feed import KvVariant, MakeCache, Mode, feed, fitting_chunk, texts_at_once
from compressor.evals.text import vocabulary_size
from compressor.evals.windows import Window, check_finite, split_windows, summary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressor.progress import Progress


@dataclass(frozen=True)
class Weight:
    """What one sequence takes in a cache: its tokens, bytes held, bytes at the peak."""

    tokens: int
    stored_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class ScoredText:
    """Figures of one format on the text, and what its cache and the 16-bit one weigh."""

    text: TextResult
    weight: Weight
    weight_16bit: Weight


def score_text(
    model: PreTrainedModel,
    ids_T: torch.Tensor,
    variants: Sequence[KvVariant],
    usual: MakeCache,
    *,
    chunk: int,
    mode: Mode,
    context: int,
    first: int | None,
    seed: int,
    progress: Progress,
) -> list[ScoredText]:
    """Every variant on the same windows, fed ``chunk`` tokens at a time; one result for each.

    In mode ``vllm`` the first half of a window is prefilled and not scored.

    Raises:
        UserError: nothing is left to score.
        CheckpointError: logits are NaN or infinite.
    """
    import torch

    chunk = fitting_chunk(chunk, vocabulary_size(model))
    windows = split_windows(ids_T, context, first)
    tokens = sum(map(len, windows)) - len(windows) * (first is not None)
    done: list[list[Window]] = [[] for _ in variants]
    weights: list[Weight] = []
    for length, same in groupby(windows, key=len):
        for batch in _batches(list(same), texts_at_once(length, chunk)):
            caches = [usual(), *(variant.make() for variant in variants)]
            ids_RT = torch.stack(batch)
            prefill = length // 2 if mode == "vllm" else 0
            scored = _score(model, ids_RT, caches, chunk, prefill)
            for windows_of, found in zip(done, scored, strict=True):
                for window in found:
                    check_finite(window, len(windows_of))
                    if window.scored:
                        windows_of.append(window)
            if not weights:  # the first windows are the longest
                weights = [
                    Weight(length, cache.nbytes() // len(batch), cache.peak_nbytes() // len(batch))
                    for cache in caches
                ]
            progress.advance(len(batch) * (length - (first is not None)))
    if not all(done):
        raise UserError(
            f"half of a window of {context} tokens scores nothing", fix="use a longer context or text"
        )
    return [
        ScoredText(
            summary(windows_of, tokens=tokens, context=context, seed=seed), weight, weight_16bit=weights[0]
        )
        for windows_of, weight in zip(done, weights[1:], strict=True)
    ]


def _score(
    model: PreTrainedModel, ids_RT: torch.Tensor, caches: Sequence[object], chunk: int, prefill: int
) -> list[list[Window]]:
    """For each cache but the first, which is the 16-bit one, a window for each row."""
    import torch

    rows, length = ids_RT.shape
    found = [[Window() for _ in range(rows)] for _ in caches[1:]]
    feeds = [feed(model, ids_RT, cache, chunk, prefill=prefill) for cache in caches]
    for (start, source_RPV), *others in zip(*feeds, strict=True):
        # The prefilled half is not scored, and nothing follows the last token.
        scored = 0 if start < prefill else min(source_RPV.shape[1], length - 1 - start)
        if scored == 0:
            continue
        with torch.inference_mode():
            source_RPV = source_RPV[:, :scored].log_softmax(-1)
            targets_RP = ids_RT[:, start + 1 : start + 1 + scored]
            for windows, (_, result_RPV) in zip(found, others, strict=True):
                for row, window in enumerate(windows):
                    window.add(source_RPV[row], result_RPV[row, :scored].log_softmax(-1), targets_RP[row])
    return found


def _batches(windows: list[torch.Tensor], size: int) -> list[list[torch.Tensor]]:
    return [windows[start : start + size] for start in range(0, len(windows), size)]
