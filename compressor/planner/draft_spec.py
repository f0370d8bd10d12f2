"""The recipe's ``drafts`` section -> what the stage is told, and why it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compressor import data
from compressor.calibration.check import check_calibration
from compressor.calibration.pinned import pinned
from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import FactorySource
from compressor.device import available_device_bytes
from compressor.drafts.eagle3_shape import shape_for
from compressor.drafts.native_table import prediction_names, runnable_family
from compressor.drafts.spec import Kind
from compressor.errors import CheckpointError, UserError
from compressor.evals.base import EvalSpec
from compressor.evals.decode_spec import HELD_OUT_EVERY, SHIPPED_DOMAINS, DecodeSpec
from compressor.planner.kv_bytes import full_context, kv_bytes
from compressor.planner.sizes import planned_device
from compressor.recipe.drafts import DraftsSection, DraftTrainSection
from compressor.recipe.load import LoadedRecipe
from compressor.recipe.mixtures import calibration_spec
from compressor.stages.base import Claim
from compressor.stages.drafts_spec import DraftSpec, RowsSpec, TrainSpec

DEFAULT_GENERATED = 1_000_000
DEFAULT_TEMPERATURE = 0.8
DEFAULT_RATES: dict[Kind, float] = {"eagle3": 1e-3, "native": 5e-5}
# Of a shipped text; fewer bytes make a token in most others. The tokenizer counts exactly, later.
_BYTES_PER_TOKEN = 6
_LEAST_ROWS = 4
# Texts that are written at once, fewest and most; and the share of an accelerator that their caches may take.
_AT_ONCE = (16, 1024)
_CACHES_SHARE = 0.25


def kind_faults(section: DraftsSection, source: Source, claims: Sequence[Claim]) -> list[UserError]:
    """Why no draft of this kind goes with the source, or with what becomes of its tensors."""
    if isinstance(source, FactorySource):
        what = f"{source.factory} makes the model: no engine drafts for it"
        return [UserError(what, where="drafts", fix="leave the section out")]
    try:
        if section.kind == "eagle3":
            known = None if section.training is None else section.training.vocabulary_size
            shape_for(source.config, draft_vocabulary=known)
        elif section.kind == "native":
            runnable_family(source.headers, source.config)
            names = set(prediction_names(source.headers, source.config))
            kept = [claim for claim in claims if claim.kept is not None and claim.tensor.name in names]
            if kept and section.training is not None:
                what = f"{kept[0].tensor.name} stays as the source compresses it: it cannot be trained"
                return [UserError(what, where="drafts.train", fix="set model.from to dequantize")]
    except CheckpointError as error:
        return [UserError(error.what, where="drafts.kind", fix=error.fix)]
    except UserError as error:
        return [error]
    return []


def head_spec(
    section: DraftsSection,
    loaded: LoadedRecipe,
    config: dict[str, Any],
    evaluation: EvalSpec | None,
    faults: list[UserError],
    warnings: list[str],
    *,
    planning: bool,
) -> DraftSpec | None:
    """What the stage is told of a head; None after adding to ``faults`` why nothing can be.

    Args:
        section: of kind eagle3 or native.
        loaded: its recipe.
        config: of the source, its positions scaled.
        evaluation: texts that nothing may be trained on.
        faults: see above.
        warnings: gets what there is to know before starting.
        planning: whether Hub datasets need not be reachable.

    Raises:
        PlanError: calibration texts are missing or cannot be read.
    """
    how, seed = section.training, loaded.recipe.seed
    train = how or DraftTrainSection(data="text")
    seed = seed if train.seed is None else train.seed
    longest = full_context(config)
    length, unroll = train.sequence_length, train.unroll or section.tokens
    if longest is not None and length > longest:
        what = f"rows of {length:,} tokens are longer than the {longest:,} that the model reads"
        faults.append(UserError(what, where="drafts.train.sequence_length", fix=f"set it to {longest}"))
    if length < unroll + 3:
        what = f"rows of {length} tokens are too short to propose {unroll} tokens ahead in them"
        faults.append(UserError(what, where="drafts.train.sequence_length", fix="raise it"))
    if faults:
        return None
    steps = train.tokens // (train.batch * length) if how is not None else 0
    if how is not None and not steps:
        what = f"{train.tokens:,} tokens are no whole step of {train.batch} x {length:,}"
        faults.append(UserError(what, where="drafts.train.tokens", fix="raise it, or lower batch"))
    new = (train.new_tokens or length // 2) if train.data == "generated" else 0
    rows = _rows(train, loaded, length - new, new, steps, longest, evaluation, faults, warnings, planning)
    if rows is None or faults:
        return None
    default = DEFAULT_RATES[section.kind]
    return DraftSpec(
        kind=section.kind,
        tokens=section.tokens,
        rows=replace(rows, seed=seed, at_once=_at_once(config, length)),
        train=TrainSpec(
            steps=steps,
            batch=train.batch,
            learning_rate=train.learning_rate or default,
            warmup_steps=min(max(1, round(train.warmup * steps)), max(1, steps - 1)),
            unroll=unroll,
            cache_bytes=train.cache or 0,
            patience=train.patience,
            save_every=train.save_every,
            seed=seed,
            dtype="bfloat16" if planned_device() == "cuda" else "float32",
            vocabulary_size=train.vocabulary_size,
        ),
        measure=measure_spec(section, seed),
    )


def _at_once(config: dict[str, Any], length: int) -> int:
    """Texts that are written at once: as many as their caches fit, for each step of them takes a while.

    A power of two: what happens to be free must not make another plan.
    """
    cache, _ = kv_bytes(config, length)
    if planned_device() == "cpu" or cache is None:
        return _AT_ONCE[0]
    fitting = int(_CACHES_SHARE * available_device_bytes()) // max(1, cache.total_bytes)
    return min(max(1 << fitting.bit_length() - 1 if fitting else 0, _AT_ONCE[0]), _AT_ONCE[1])


def measure_faults(section: DraftsSection, config: dict[str, Any]) -> list[UserError]:
    """Why decoding cannot be measured so, if it is to be."""
    asked, longest = section.measure, full_context(config)
    if asked is None:
        return []
    faults = []
    if longest is not None and asked.prompt_tokens + asked.new_tokens > longest:
        what = (
            f"prompts of {asked.prompt_tokens:,} tokens and {asked.new_tokens:,} more are longer than the "
            f"{longest:,} that the model reads"
        )
        faults.append(UserError(what, where="drafts.measure", fix="lower prompt_tokens or new_tokens"))
    cache, _ = kv_bytes(config, 1)
    # As ``model.reader.Reader.mark`` will say, after all else is done.
    if cache is not None and cache.state_bytes and max(asked.batches) > 1:
        what = "the model keeps recurrent states, and these sequences are decoded one at a time here"
        faults.append(UserError(what, where="drafts.measure.batches", fix="set it to [1], or leave it out"))
    return faults


def measure_spec(section: DraftsSection, seed: int) -> DecodeSpec | None:
    """How decoding is measured, if it is."""
    asked = section.measure
    if asked is None:
        return None
    return DecodeSpec(
        domains={domain: data.find(name) for domain, name in SHIPPED_DOMAINS.items()},
        prompts=asked.prompts,
        prompt_tokens=asked.prompt_tokens,
        new_tokens=asked.new_tokens,
        tokens=section.tokens,
        batches=asked.batches,
        runs=asked.runs,
        seed=seed,
    )


def _rows(
    train: DraftTrainSection,
    loaded: LoadedRecipe,
    prompt: int,
    new: int,
    steps: int,
    longest: int | None,
    evaluation: EvalSpec | None,
    faults: list[UserError],
    warnings: list[str],
    planning: bool,
) -> RowsSpec | None:
    """The rows, as many as are wanted and as the texts surely hold."""
    found = calibration_spec(loaded.recipe, loaded.folder, longest)
    spec, told = pinned(replace(found, images=None), planning=planning)
    warnings += [warning for warning in told if warning not in warnings]
    wanted = steps * train.batch
    temperature = DEFAULT_TEMPERATURE if train.temperature is None else train.temperature
    if new:
        wanted = min(wanted, max(1, (train.max_generated_tokens or DEFAULT_GENERATED) // new))
    held_out = train.held_out_rows
    texts = _distinct(spec, prompt, max(1, wanted) + held_out)
    if not steps:
        # What is only measured is measured on what there is.
        held_out = max(1, min(held_out, texts - 1))
    if texts < held_out + max(1, min(wanted, _LEAST_ROWS)):
        what = f"the calibration texts surely hold only {texts:,} stretches of {prompt:,} tokens"
        fix = "name more text, or lower drafts.train.held_out_rows or sequence_length"
        faults.append(UserError(what, where="drafts.train", fix=fix))
        return None
    if not new or not temperature:
        # The same again would be written after the same.
        wanted = min(wanted, texts - held_out)
    kept = tuple(_without_measured(dataset) for dataset in spec.datasets)
    shown = replace(spec, datasets=kept, num_samples=texts, sequence_length=prompt)
    measured = {"what drafts are measured on": data.find(SHIPPED_DOMAINS["prose"])}
    measured |= evaluation.texts if evaluation else {}
    faults += check_calibration(shown, measured, longest)
    return RowsSpec(shown, max(1, wanted), held_out, new, temperature if new else 0.0, 0)


def _without_measured(dataset: DatasetSpec) -> DatasetSpec:
    """Without the documents that decoding is measured on, of the shipped texts that serve both."""
    shared = {data.find(name) for name in SHIPPED_DOMAINS.values()}
    return replace(dataset, held_out_every=HELD_OUT_EVERY) if dataset.path in shared else dataset


def _distinct(spec: CalibrationSpec, length: int, wanted: int) -> int:
    """Rows of so many tokens that the texts surely hold; of datasets on the Hub, any number."""
    most = float(wanted)
    for dataset, share in zip(spec.datasets, spec.shares, strict=True):
        if dataset.path is not None:
            most = min(most, data.text_bytes(dataset.path) / _BYTES_PER_TOKEN / length / share)
    return int(most)
