"""Decoding of the result with its draft as both lie on disk, against plain decoding.

A stage of its own: to measure otherwise, or again, no head is trained anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.checkpoint.base import Source
from compressor.progress import Progress
from compressor.stages.drafts_open import NATIVE, open_drafter, open_target
from compressor.stages.drafts_spec import DRAFT_FOLDER, DraftSpec


def decode_stage(source: Source, checkpoint: Path, spec: DraftSpec, progress: Progress) -> dict[str, Any]:
    """``decoding``: with the draft and with a control (``DecodingResult.to_json``).

    Args:
        source: what the checkpoint was made of.
        checkpoint: folder of the finished stage ``drafts``.
        spec: which draft it has, and how it is measured.
        progress: told of the continuations.

    Raises:
        CheckpointError: checkpoint or draft cannot be loaded, or a greedy text in float32 differs from plain
            decoding's though no input is rounded.
        UserError: a text is too short.
    """
    from compressor.drafts.repeat import RepeatLast
    from compressor.evals.decode_compare import check_lossless, compare_decoding
    from compressor.model.load import load_tokenizer

    assert spec.measure is not None
    target, rounded = open_target(checkpoint, source, spec.train)
    tokenizer = load_tokenizer(checkpoint)
    place = NATIVE if spec.kind == "native" else str(checkpoint / DRAFT_FOLDER)
    drafters = {"draft": open_drafter(place, checkpoint, target, tokenizer), "repeat": RepeatLast()}
    found = compare_decoding(target, tokenizer, drafters, spec.measure, progress, rounded=rounded)
    check_lossless(found)
    return {"decoding": found.to_json()}
