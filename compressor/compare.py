"""Measures any checkpoint against any source on any text: what ``compress eval`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.layout import load_config
from compressor.checkpoint.sources import From, open_source
from compressor.data import find
from compressor.errors import CheckpointError, PlanError, UserError
from compressor.evals.base import EvalResult, EvalSpec, GenerationSpec, SpeedSpec
from compressor.evals.kv_feed import Mode
from compressor.evals.long_spec import LongSpec
from compressor.evals.run import check_tasks
from compressor.planner.evaluated_long import long_spec
from compressor.planner.kv_bytes import full_context
from compressor.progress import Progress
from compressor.recipe.evaluate_long import LongSection
from compressor.stages.drafts_open import kind_of, open_drafter
from compressor.stages.kv_evaluate import check_kv_formats, kv_variants, with_kv
from compressor.workspace import Workspace

if TYPE_CHECKING:
    from compressor.drafts.base import Drafter
    from compressor.evals.decode_record import DecodingResult
    from compressor.evals.decode_spec import DecodeSpec
    from compressor.model.load import LoadedCheckpoint

# Keys of a recipe -> how the command line spells them.
LONG_OPTIONS = {
    "evaluate.long.documents": "--long",
    "evaluate.long.count": "--long-documents",
    "evaluate.long.tokens": "--long-tokens",
    "evaluate.long.stride": "--long-stride",
    "evaluate.long.needles.lengths": "--long-needles",
    "evaluate.long.ruler.lengths": "--long-ruler-tokens",
}


@dataclass(frozen=True)
class More:
    """What ``compare`` measures beyond the text; see ``EvalSpec``."""

    tasks: Mapping[str, int | None] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    generation: GenerationSpec | None = None
    speed: SpeedSpec | None = None


def compare(
    checkpoint: Path,
    source: str,
    text: str,
    *,
    revision: str | None,
    from_: From | None = None,
    tokens: int | None,
    context: int,
    space: Workspace,
    progress: Progress,
    kv: Sequence[str] = (),
    kv_mode: Mode = "strict",
    kv_needle: Sequence[int] = (),
    long: LongSection | None = None,
    long_window: int | None = None,
    long_seed: int = 0,
    more: More = More(),
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
        space: keeps what is fetched from the Hub, and the source's answers to tasks.
        progress: told of everything.
        kv: KV-cache formats to measure the checkpoint with, against itself with a 16-bit cache.
        kv_mode: what attention reads of them, see ``evals.kv_feed``.
        kv_needle: lengths in tokens of texts to hide needles in, for these formats.
        long: what to measure at long context, or None.
        long_window: tokens of the sliding window, or None for what the source's config says.
        long_seed: of numbers, samples and intervals.
        more: what else is measured.

    Raises:
        UserError: anything that is missing, unreadable or does not fit together.
    """
    _check_folder(checkpoint)
    check_kv_formats(kv, checkpoint)
    found = find(text, what="evaluation text")
    check_tasks(more.tasks)
    opened = open_source(source, revision=revision, cache=space.hub, from_=from_)
    spec = EvalSpec(text=found, text_label=text, tokens=tokens, context=context, **vars(more))
    if long is not None:
        spec = replace(spec, long=_long(long, opened.config, checkpoint, long_window, long_seed))
    import torch

    from compressor.evals.long import check_long, evaluate_long
    from compressor.evals.run import evaluate_pair
    from compressor.evals.text import check_context
    from compressor.model.load import load_source_model, load_tokenizer, set_dtype
    from compressor.stages.evaluate import source_answers
    from compressor.stages.simulated import simulate_activations

    tokenizer = load_tokenizer(checkpoint)
    if spec.long is not None:
        check_long(tokenizer, spec.long)
    result = _result(checkpoint, opened)
    variants = kv_variants(result.model.config, kv, kv_mode, checkpoint, progress)
    for length in kv_needle:
        check_context(result.model, length)
    result = simulate_activations(result, checkpoint, opened)
    source_model, model = load_source_model(opened, torch.float32), result.model
    kept = partial(source_answers, opened, space.answers)
    measured = evaluate_pair(source_model, result, tokenizer, spec, progress, hub=space.hub, kept=kept)
    if more.tasks or more.speed:
        # They are computed in another dtype.
        set_dtype(model, torch.float32)
    measured = with_kv(measured, model, tokenizer, variants, spec, progress, mode=kv_mode, needle=kv_needle)
    if spec.long is None:
        return measured
    return replace(measured, long=evaluate_long(source_model, model, tokenizer, spec.long, progress))


def compare_drafts(
    checkpoint: Path,
    source: str,
    draft: str,
    spec: DecodeSpec,
    *,
    revision: str | None,
    from_: From | None,
    dtype: str | None,
    cache: Path,
    progress: Progress,
) -> DecodingResult:
    """Decoding of ``checkpoint`` with proposed tokens against plain decoding, and with two controls.

    Args:
        checkpoint: as of ``compare``.
        source: the same; says how experts that were written one by one go together.
        draft: ``native``, or a folder, see ``stages.drafts_open``.
        spec: how to measure.
        revision: as of ``compare``.
        from_: the same.
        dtype: name of the dtype to compute in; None for what the device is fast in.
        cache: as of ``compare``.
        progress: told of everything.

    Raises:
        UserError: anything that is missing, unreadable or does not fit together.
    """
    _check_folder(checkpoint)
    kind = kind_of(draft)
    opened = open_source(source, revision=revision, cache=cache, from_=from_)
    import torch

    from compressor.device import fast_dtype, pick_device
    from compressor.drafts.lookup import PromptLookup
    from compressor.drafts.repeat import RepeatLast
    from compressor.evals.decode_compare import compare_decoding
    from compressor.model.load import load_tokenizer, set_dtype
    from compressor.stages.simulated import simulate_activations

    device = pick_device()
    result = simulate_activations(_result(checkpoint, opened), checkpoint, opened)
    target = set_dtype(result.model, getattr(torch, dtype) if dtype else fast_dtype(device))
    target.to(device).requires_grad_(False)
    tokenizer = load_tokenizer(checkpoint)
    try:
        drafter = open_drafter(draft, checkpoint, target, tokenizer)
    except CheckpointError as error:
        # Of a recipe; the command line has an option.
        where = "--draft" if error.where == "drafts.kind" else error.where
        raise CheckpointError(error.what, where=where, fix=error.fix) from error
    drafters: dict[str, Drafter] = {
        kind: drafter,
        "last token": RepeatLast(),
        "look-up": PromptLookup(),
    }
    rounded = result.activations_simulated is True
    return compare_decoding(target, tokenizer, drafters, spec, progress, rounded=rounded)


def _check_folder(checkpoint: Path) -> None:
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            "no checkpoint: there is no config.json", where=str(checkpoint), fix="name a folder"
        )


def _result(checkpoint: Path, opened: Source) -> LoadedCheckpoint:
    """The checkpoint as it is measured, before activations are quantized."""
    import torch

    from compressor.model.decode import fused_tensors
    from compressor.model.load import load_checkpoint_model

    try:
        return load_checkpoint_model(checkpoint, torch.float32, fused=fused_tensors(opened), cache_16bit=True)
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


def _long(
    section: LongSection, source: dict[str, Any], checkpoint: Path, window: int | None, seed: int
) -> LongSpec:
    """The options as a spec; faults name the options."""
    longest = full_context(_config(checkpoint))
    try:
        return long_spec(section, source, longest, beside=Path.cwd(), trained=window, seed=seed)
    except PlanError as error:
        raise PlanError([_of_option(fault) for fault in error.faults]) from error
    except UserError as error:
        raise _of_option(error) from error


def _of_option(fault: UserError) -> UserError:
    """``evaluate.long.needles.lengths`` of a recipe is an option's on the command line."""
    fix = fault.fix
    for key, option in LONG_OPTIONS.items():
        fix = fix.replace(key, option)
    return UserError(fault.what, where=LONG_OPTIONS.get(fault.where, fault.where), fix=fix)


def _kind(checkpoint: Path) -> object:
    """The folder's ``model_type``."""
    return _config(checkpoint).get("model_type")


def _config(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / "config.json"
    return load_config(file.read_bytes(), str(file))
