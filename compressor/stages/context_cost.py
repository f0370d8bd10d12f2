"""What scaling positions costs where the source reads well without: both in 16 bit, on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.evals.base import EvalSpec

if TYPE_CHECKING:
    from compressor.progress import Progress


def scaling_cost(
    source: Source, scaled: Source, checkpoint: Path, spec: EvalSpec, progress: Progress
) -> dict[str, Any]:
    """The scaled source against the source, as ``TextResult.to_json`` has it; ``result`` is the scaled one.

    Args:
        source: as it was given.
        scaled: the same tensors under the scaled config.
        checkpoint: the result's folder, for its tokenizer.
        spec: text, tokens, context and seed.
        progress: told of the tokens.

    Raises:
        CheckpointError: a model cannot be loaded, or computes NaN.
        UserError: an unusable text.
    """
    import torch

    from compressor.device import pick_device
    from compressor.evals.run import leading_token
    from compressor.evals.text import compare_on_text, tokens_from_text
    from compressor.model.load import load_source_model, load_tokenizer

    tokenizer, device = load_tokenizer(checkpoint), pick_device()
    plain, longer = (load_source_model(one, torch.float32).to(device) for one in (source, scaled))
    progress.log("evaluate: the source with and without its positions scaled")
    found = compare_on_text(
        plain,
        longer,
        tokens_from_text(tokenizer, spec.text, spec.tokens),
        context=spec.context,
        progress=progress,
        first=leading_token(tokenizer),
        seed=spec.seed,
    )
    return found.to_json()
