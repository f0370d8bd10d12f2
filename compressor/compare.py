"""Measures any checkpoint against any source on any text: what ``compress eval`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressor.checkpoint.layout import load_config
from compressor.checkpoint.sources import From, open_source
from compressor.data import find
from compressor.errors import CheckpointError
from compressor.evals.base import EvalResult, EvalSpec
from compressor.evals.kv_feed import Mode
from compressor.progress import Progress
from compressor.stages.kv_evaluate import check_kv_formats, kv_variants, with_kv


def compare(
    checkpoint: Path,
    source: str,
    text: str,
    *,
    revision: str | None,
    from_: From | None = None,
    tokens: int | None,
    context: int,
    cache: Path,
    progress: Progress,
    kv: Sequence[str] = (),
    kv_mode: Mode = "strict",
    kv_needle: Sequence[int] = (),
) -> EvalResult:
    """Perplexity, KL and agreement of ``checkpoint`` against ``source``, both loaded from disk.

    Args:
        checkpoint: a folder, quantized with compressed-tensors or not.
        source: as in a recipe's ``model.source``.
        text: plain UTF-8 text, or JSON lines with a field ``text``; shipped texts are found too.
        revision: of a Hub source.
        from_: as in a recipe's ``model.from``, where the source itself is quantized.
        tokens: how many of its tokens are read, or None for all.
        context: tokens of one window.
        cache: folder that a Hub source is downloaded to.
        progress: told of everything.
        kv: KV-cache formats to measure the checkpoint with, against itself with a 16-bit cache.
        kv_mode: what attention reads of them, see ``evals.kv_feed``.
        kv_needle: lengths in tokens of texts to hide needles in, for these formats.

    Raises:
        UserError: anything that is missing, unreadable or does not fit together.
    """
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            "no checkpoint: there is no config.json", where=str(checkpoint), fix="name a folder"
        )
    check_kv_formats(kv, checkpoint)
    found = find(text, what="evaluation text")
    opened = open_source(source, revision=revision, cache=cache, from_=from_)
    import torch

    from compressor.evals.run import evaluate_pair
    from compressor.evals.text import check_context
    from compressor.model.decode import fused_tensors
    from compressor.model.load import load_checkpoint_model, load_source_model, load_tokenizer
    from compressor.stages.simulated import simulate_activations

    spec = EvalSpec(text=found, text_label=text, tokens=tokens, context=context)
    try:
        result = load_checkpoint_model(
            checkpoint, torch.float32, fused=fused_tensors(opened), cache_16bit=True
        )
    except CheckpointError as error:
        # Experts that were written one by one are put together by the source's names.
        kind, wanted = _kind(checkpoint), opened.config.get("model_type")
        if kind == wanted:
            raise
        raise CheckpointError(
            f"the source is a {wanted}, the checkpoint a {kind}: {error.what}",
            where=error.where,
            fix="name the source that it was made from",
        ) from error
    variants = kv_variants(result.model.config, kv, kv_mode, checkpoint, progress)
    for length in kv_needle:
        check_context(result.model, length)
    result = simulate_activations(result, checkpoint, opened)
    tokenizer = load_tokenizer(checkpoint)
    measured = evaluate_pair(load_source_model(opened, torch.float32), result, tokenizer, spec, progress)
    model = result.model
    return with_kv(measured, model, tokenizer, variants, spec, progress, mode=kv_mode, needle=kv_needle)


def _kind(checkpoint: Path) -> object:
    """The folder's ``model_type``."""
    file = checkpoint / "config.json"
    return load_config(file.read_bytes(), str(file)).get("model_type")
