"""Loads the assembled checkpoint back from disk, proves that it runs, and measures it against its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.budget.gates import gate_samples
from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import allowed_factory
from compressor.device import available_memory_bytes
from compressor.errors import CheckpointError, UserError
from compressor.evals.answers import Answers
from compressor.evals.base import SHIPPED_TASKS, EvalResult, EvalSpec
from compressor.model.quiet import quiet
from compressor.progress import Progress
from compressor.stages.base import Claim
from compressor.stages.context_cost import scaling_cost
from compressor.stages.kv_evaluate import PLAN, kv_variants, plan_modes, with_kv
from compressor.stages.simulated import simulate_activations
from compressor.stages.tokens import source_tokenizer
from compressor.workspace import Workspace

if TYPE_CHECKING:
    from compressor.model.load import LoadedCheckpoint

# fp32 parameters of one model, and room for logits and activations.
_BYTES_PER_WEIGHT = 4
_ROOM_BYTES = 2 << 30


def memory_needed(claims: Sequence[Claim], spec: EvalSpec | None) -> int:
    """Bytes that loading the result, and for an evaluation the source beside it, takes."""
    models = 1 if spec is None else 2
    return models * _BYTES_PER_WEIGHT * sum(claim.tensor.numel for claim in claims) + _ROOM_BYTES


def evaluate_stage(
    source: Source,
    checkpoint: Path,
    claims: Sequence[Claim],
    spec: EvalSpec | None,
    progress: Progress,
    most_bytes: int | None = None,
    scaled: Source | None = None,
    folder: Path | None = None,
    *,
    space: Workspace,
) -> dict[str, Any]:
    """Facts for the report: ``evaluation`` (or None), ``gate_samples``, and how the checkpoint was reloaded.

    ``most_bytes``: of memory, where not all that is free may be taken. ``scaled``: the source with its
    positions scaled, to be measured as well (``scaling_cost``). ``folder``: keeps what is measured at long
    context, until all is. ``space``: keeps the source's answers, and what is fetched from the Hub.

    Raises:
        CheckpointError: transformers cannot load the result, or it computes NaN.
        UserError: too little memory, or an unusable text.
    """
    needed, available = memory_needed(claims, spec), available_memory_bytes()
    if most_bytes is not None:
        available = min(available, most_bytes)
    if needed > available:
        short = f"that needs about {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are free"
        if spec is not None:
            raise UserError(
                f"the result cannot be measured here: {short}; the compressed weights are kept",
                where="evaluate",
                fix="run the same command where there is more, or export unmeasured: --set evaluate=null",
            )
        progress.warn(f"the result is checked by names, shapes and dtypes, but not loaded back: {short}")
        return {"evaluation": None, "gate_samples": {}, "reloaded": None}
    result = reload(checkpoint, source)
    if spec is None:
        return {"evaluation": None, "gate_samples": {}, "reloaded": result.via}
    measured = measure(source, checkpoint, result, spec, progress, folder, space=space)
    facts = {
        "evaluation": measured.to_json(),
        "gate_samples": {name: sample.to_json() for name, sample in gate_samples(measured).items()},
        "reloaded": measured.loaded_via,
    }
    if scaled is None:
        return facts
    del result  # two models are in memory at once, never three
    return facts | {"scaling": scaling_cost(source, scaled, checkpoint, spec, progress)}


def check_tokens(source: Source, spec: EvalSpec, space: Workspace) -> None:
    """Tokenizes the texts, and fetches tasks' items, before the weights are compressed.

    A text that is too short costs seconds then, not hours.

    Raises:
        CheckpointError: the source has no tokenizer that transformers can load.
        UserError: an unusable text, or a task whose items cannot be fetched.
    """
    from compressor.evals.text import tokens_from_text

    tokenizer = source_tokenizer(source, space.partials)
    try:
        tokens_from_text(tokenizer, spec.text, spec.tokens)
    except UserError as error:
        if error.where != str(spec.text):
            raise
        fix = "lower evaluate.tokens, or name another evaluate.text"
        raise UserError(f"{spec.text_label}: {error.what}", where="evaluate.text", fix=fix) from error
    items = [task for task in spec.tasks if task not in SHIPPED_TASKS]
    if items:
        from compressor.evals.tasks import load_task

        for task in items:
            load_task(task, space.hub)
    if spec.long is None:
        return
    from compressor.evals.long import check_long

    try:
        check_long(tokenizer, spec.long)
    except UserError as error:
        raise UserError(error.what, where="evaluate.long", fix=error.fix) from error


def source_answers(source: Source, folder: Path, computed: str) -> Answers:
    """What the source answered to the same requests before, computed in the same way; kept in ``folder``.

    ``computed``: dtype and device.
    """
    import torch
    import transformers

    identity = {"source": source.fingerprint, "computed": computed}
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    return Answers(folder, identity | versions)


@quiet()
def reload(checkpoint: Path, source: Source) -> LoadedCheckpoint:
    """The checkpoint as transformers loads it, with a 16-bit KV cache, which is measured apart.

    One short forward pass must give finite logits.
    """
    import torch

    from compressor.model.decode import fused_tensors
    from compressor.model.load import load_checkpoint_model

    loaded = load_checkpoint_model(
        checkpoint,
        torch.float32,
        fused=fused_tensors(source),
        factory=allowed_factory(source),
        cache_16bit=True,
    )
    with torch.no_grad():
        logits = loaded.model(torch.arange(8)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("the reloaded checkpoint does not compute finite logits", where=str(checkpoint))
    return simulate_activations(loaded, checkpoint, source)


def measure(
    source: Source,
    checkpoint: Path,
    result: LoadedCheckpoint,
    spec: EvalSpec,
    progress: Progress,
    folder: Path | None = None,
    *,
    space: Workspace,
) -> EvalResult:
    """Everything that ``spec`` asks for, of the reloaded result against its source.

    ``folder``: where what is measured at long context is kept until all is. ``space``: keeps the source's
    answers, and what is fetched from the Hub.

    A result with a ``kv_plan.json`` is also measured with its cache stored so, against a 16-bit one: as
    stored, and as vLLM reads it, where that differs.
    """
    import torch

    from compressor.evals.run import evaluate_pair
    from compressor.model.load import load_source_model, load_tokenizer, set_dtype

    tokenizer, model = load_tokenizer(checkpoint), result.model
    variants = {
        mode: kv_variants(model.config, (PLAN,), mode, checkpoint, progress)
        for mode in plan_modes(checkpoint)
    }
    source_model = load_source_model(source, torch.float32)
    kept = partial(source_answers, source, space.answers)
    measured = evaluate_pair(source_model, result, tokenizer, spec, progress, hub=space.hub, kept=kept)
    if variants:
        # Tasks may have left it in another.
        set_dtype(model, torch.float32)
    kv = [
        with_kv(measured, model, tokenizer, asked, spec, progress, mode=mode).kv
        for mode, asked in variants.items()
    ]
    measured = replace(measured, kv=tuple(found for of_mode in kv for found in of_mode))
    if spec.long is None:
        return measured
    from compressor.evals.long import evaluate_long

    return replace(measured, long=evaluate_long(source_model, model, tokenizer, spec.long, progress, folder))
