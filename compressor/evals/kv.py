"""KV-cache formats, measured: one model with each of them against itself with a 16-bit cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.evals.kv_feed import KvVariant, MakeCache, Mode, continues_in_chunks
from compressor.evals.kv_generation import compare_generation
from compressor.evals.kv_needle import find_needles, hide_needles
from compressor.evals.kv_record import GenerationResult, KvResult, NeedleResult
from compressor.evals.kv_text import ScoredText, score_text
from compressor.evals.run import leading_token
from compressor.evals.text import check_context
from compressor.evals.windows import split_windows
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress


@dataclass(frozen=True)
class KvSpec:
    """What to measure of each format.

    Attributes:
        context: tokens of a window of the text.
        mode: what attention reads: see ``kv_feed``.
        prompts: how many windows are continued greedily, from their first half; 0 for none.
        new_tokens: by how many tokens, at most the other half of a window.
        needle_tokens: lengths of the texts that needles are hidden in; empty for none.
        needle_depths: at which depths.
        needle_trials: needles of each length and depth.
        seed: of the bootstrap interval and the needles.
    """

    context: int
    mode: Mode = "strict"
    prompts: int = 8
    new_tokens: int = 128
    needle_tokens: tuple[int, ...] = ()
    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle_trials: int = 4
    seed: int = 0


@quiet()
def evaluate_kv(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_T: torch.Tensor,
    variants: Sequence[KvVariant],
    usual: MakeCache,
    spec: KvSpec,
    progress: Progress,
) -> list[KvResult]:
    """One result for each variant, in their order.

    Args:
        model: in evaluation mode, on its device, in the dtype to compute in.
        tokenizer: of the model.
        ids_T: token ids of the text, without special tokens.
        variants: formats; their caches must read as ``spec.mode`` says.
        usual: makes the 16-bit cache that they are measured against.
        spec: what to measure.
        progress: told the tokens done.

    Raises:
        UserError: windows or needles that the model has no positions for.
        CheckpointError: logits are NaN or infinite.
    """
    for length in (spec.context, *spec.needle_tokens):
        check_context(model, length)
    one_by_one = not continues_in_chunks(model, ids_T, usual)
    if one_by_one:
        progress.log("this model is fed token by token: transformers does not continue it in chunks")
    found: dict[str, KvResult] = {}
    chunks = {variant.name: 1 if one_by_one else variant.chunk_tokens for variant in variants}
    for chunk in sorted(set(chunks.values()), reverse=True):
        group = [variant for variant in variants if chunks[variant.name] == chunk]
        found |= _measure(model, tokenizer, ids_T, group, usual, spec, chunk, progress)
    return [found[variant.name] for variant in variants]


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_T: torch.Tensor,
    variants: Sequence[KvVariant],
    usual: MakeCache,
    spec: KvSpec,
    chunk: int,
    progress: Progress,
) -> dict[str, KvResult]:
    """Variants that are fed in chunks of the same size, by name."""
    import torch

    first = leading_token(tokenizer)
    progress.start("kv text", len(ids_T), "tokens")
    texts = score_text(
        model,
        ids_T,
        variants,
        usual,
        chunk=chunk,
        mode=spec.mode,
        context=spec.context,
        first=first,
        seed=spec.seed,
        progress=progress,
    )
    progress.finish()
    generations: list[GenerationResult] | list[None] = [None] * len(variants)
    windows = [
        window_T for window_T in split_windows(ids_T, spec.context, first) if len(window_T) == spec.context
    ]
    if spec.prompts and windows:
        half = spec.context // 2
        prompts_RT = torch.stack(windows[: spec.prompts])[:, :half]
        new_tokens = min(spec.new_tokens, spec.context - half)
        total = len(prompts_RT) * (half + new_tokens) * (len(variants) + 1)
        progress.start("kv generation", total, "tokens")
        generations = compare_generation(
            model,
            prompts_RT,
            new_tokens,
            variants,
            usual,
            chunk=chunk,
            mode=spec.mode,
            progress=progress,
        )
        progress.finish()
    needles: list[NeedleResult] | list[None] = [None] * len(variants)
    if spec.needle_tokens:
        hidden = [
            needle
            for tokens in spec.needle_tokens
            for needle in hide_needles(
                tokenizer,
                ids_T,
                tokens=tokens,
                depths=spec.needle_depths,
                trials=spec.needle_trials,
                first=first,
                seed=spec.seed,
            )
        ]
        progress.start("kv needles", sum(len(n.ids_T) for n in hidden) * (len(variants) + 1), "tokens")
        needles = find_needles(model, hidden, variants, usual, chunk=chunk, mode=spec.mode, progress=progress)
        progress.finish()
    return {
        variant.name: _result(variant.name, spec.mode, text, generation, needle)
        for variant, text, generation, needle in zip(variants, texts, generations, needles, strict=True)
    }


def _result(
    name: str, mode: Mode, text: ScoredText, generation: GenerationResult | None, needle: NeedleResult | None
) -> KvResult:
    return KvResult(
        format=name,
        mode=mode,
        text=text.text,
        generation=generation,
        needle=needle,
        stored_tokens=text.weight.tokens,
        stored_bytes=text.weight.stored_bytes,
        stored_bytes_16bit=text.weight_16bit.stored_bytes,
        peak_bytes=text.weight.peak_bytes,
    )
