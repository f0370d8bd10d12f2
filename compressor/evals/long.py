"""Everything that is measured at long context, of one pair of models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from compressor.device import fast_dtype, pick_device
from compressor.errors import UserError
from compressor.evals.kv_needle import Needle
from compressor.evals.long_kept import Kept
from compressor.evals.long_needle import KINDS, Kind, find, hide
from compressor.evals.long_record import (
    RESULT,
    SLIDING,
    SOURCE,
    FoundCell,
    LongResult,
    LongText,
    RulerScore,
    bucket_edges,
    by_position,
)
from compressor.evals.long_spec import LongSpec
from compressor.evals.long_text import Documents, Sliding, long_documents, measure
from compressor.evals.run import leading_token
from compressor.model.load import set_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress


def check_long(tokenizer: PreTrainedTokenizerBase, spec: LongSpec) -> None:
    """Makes what will be measured on, and forgets it: faults cost seconds, not hours.

    Raises:
        UserError: documents too short or too few, lengths without room for a number.
    """
    documents = _documents(tokenizer, spec)
    for kind, tokens in _asked_needles(spec):
        _hidden(tokenizer, documents, spec, kind, tokens, trials=1)


def evaluate_long(
    source_model: PreTrainedModel,
    result_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: LongSpec,
    progress: Progress,
    folder: Path | None = None,
) -> LongResult:
    """Measures the result against its source as it was given, whose positions nothing has scaled.

    Both compute in ``fast_dtype()``: in float32 no fused attention of GPUs takes grouped heads, and without
    it the scores of 131,072 tokens fit nowhere. They are moved and cast in place and stay so.

    Args:
        source_model: the source.
        result_model: the result.
        tokenizer: of both.
        spec: what to measure.
        progress: told the tokens done.
        folder: where what is measured is kept until all is, or None to keep nothing.

    Raises:
        UserError: documents too short or too few, needles or tasks that do not fit; too little memory.
        CheckpointError: models that give NaN.
    """
    if folder is None:
        with TemporaryDirectory() as scratch:
            return evaluate_long(source_model, result_model, tokenizer, spec, progress, Path(scratch))
    import torch

    device = pick_device()
    dtype = fast_dtype(device)
    models = {
        name: set_dtype(model, dtype).to(device)
        for name, model in ((SOURCE, source_model), (RESULT, result_model))
    }
    documents = _documents(tokenizer, spec)
    named = str(dtype).removeprefix("torch.")
    # Another kind of device computes other numbers: a table holds those of one.
    kept = Kept(folder / f"{device.type}-{named}")
    try:
        return LongResult(
            text=_text(models, documents, spec, kept, progress, named),
            needles=_needles(models, tokenizer, documents, spec, kept, progress),
            ruler=_ruler(models, tokenizer, spec, kept, progress),
            documents_label=spec.documents_label,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory does not hold a text of so many tokens: {str(error).split('. ')[0]}",
            where="evaluate.long",
            fix="lower tokens and lengths, or run the same command on a larger device: what is measured is "
            "kept",
        ) from error


def _documents(tokenizer: PreTrainedTokenizerBase, spec: LongSpec) -> Documents:
    first = leading_token(tokenizer)
    return long_documents(tokenizer, spec.documents, documents=spec.count, tokens=spec.tokens, first=first)


def _text(
    models: Mapping[str, PreTrainedModel],
    documents: Documents,
    spec: LongSpec,
    kept: Kept,
    progress: Progress,
    dtype: str,
) -> LongText:
    # Within the trained length the window is the whole document.
    sliding = Sliding(spec.trained, spec.stride) if spec.tokens > spec.trained else None
    through = () if sliding is None else ((SLIDING, SOURCE, sliding),)
    asked = ((SOURCE, SOURCE, None), *through, (RESULT, RESULT, None))
    measured = {
        name: measure(
            models[whose],
            documents,
            sliding=window,
            progress=progress,
            label=name,
            kept=partial(kept.row, name),
        )
        for name, whose, window in asked
    }
    return by_position(
        measured,
        bucket_edges(spec.trained, spec.tokens),
        names=documents.names,
        reference=SOURCE if sliding is None else SLIDING,
        window=None if sliding is None else sliding.window,
        stride=None if sliding is None else sliding.stride,
        dtype=dtype,
        seed=spec.seed,
    )


def _needles(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    spec: LongSpec,
    kept: Kept,
    progress: Progress,
) -> dict[str, tuple[FoundCell, ...]]:
    """The same texts for both models; needles are hidden in the first document."""
    found: dict[str, tuple[FoundCell, ...]] = dict.fromkeys(models, ()) if spec.needles else {}
    for kind, tokens in _asked_needles(spec):
        needles = _hidden(tokenizer, documents, spec, kind, tokens)
        for name, model in models.items():
            answers = partial(kept.answer, f"{kind}-{tokens}-{name}")
            found[name] += find(model, kind, needles, progress=progress, label=name, kept=answers)
    return found


def _asked_needles(spec: LongSpec) -> list[tuple[Kind, int]]:
    """Kinds and lengths."""
    asked = spec.needles
    return [(kind, tokens) for kind in KINDS if asked and kind in asked.kinds for tokens in asked.lengths]


def _hidden(
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    spec: LongSpec,
    kind: Kind,
    tokens: int,
    trials: int | None = None,
) -> list[Needle]:
    """Of one kind and length; the same for both models."""
    asked = spec.needles
    assert asked is not None
    return hide(
        tokenizer,
        kind,
        documents.ids_NT[0, int(documents.first is not None) :],
        tokens=tokens,
        depths=asked.depths,
        trials=trials or asked.trials,
        first=documents.first,
        seed=spec.seed,
    )


def _ruler(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    spec: LongSpec,
    kept: Kept,
    progress: Progress,
) -> dict[str, tuple[RulerScore, ...]]:
    asked = spec.ruler
    if asked is None:
        return {}
    # lm-eval takes seconds to import.
    from compressor.evals.ruler import run_ruler

    return {
        name: tuple(
            kept.score(
                f"{task}-{tokens}-{name}",
                partial(
                    run_ruler,
                    model,
                    tokenizer,
                    task,
                    tokens=tokens,
                    limit=asked.limit,
                    seed=spec.seed,
                    whose=name,
                    progress=progress,
                ),
            )
            for task in asked.tasks
            for tokens in asked.lengths
        )
        for name, model in models.items()
    }
