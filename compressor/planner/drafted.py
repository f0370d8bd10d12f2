"""What the recipe's ``drafts`` section adds to a plan: faults, memory, disk, time, key and words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.device import available_device_bytes, available_memory_bytes
from compressor.drafts.eagle3_shape import shape_for
from compressor.drafts.native_table import prediction_names
from compressor.drafts.spec import CHUNK_LOGITS
from compressor.errors import PlanError, UserError
from compressor.evals.base import EvalSpec
from compressor.evals.decode_spec import DecodeSpec
from compressor.model.families import text_config
from compressor.planner.draft_spec import head_spec, kind_faults, measure_faults, measure_spec
from compressor.planner.evaluated import UNMEASURED
from compressor.planner.faults import collect
from compressor.planner.kv_bytes import kv_bytes
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.planner.sizes import (
    DTYPE_BYTES,
    FLOPS,
    Device,
    active_parameters,
    hidden_size,
    planned_device,
    vocabulary_size,
)
from compressor.recipe.drafts import DraftsSection
from compressor.recipe.load import LoadedRecipe
from compressor.recipe.model import ModelSection, WeightRule, WeightsSection
from compressor.report.words import duration
from compressor.stages.adapt_memory import kept_bytes
from compressor.stages.base import Claim
from compressor.stages.drafts_spec import PIECE_TOKENS, DraftSpec
from compressor.workspace import stage_key

if TYPE_CHECKING:
    from compressor.planner.plan import Plan

DRAFT_VERSION, DECODE_VERSION = 1, 1
# fp32: value, gradient and two moments; and the best values, on the disk.
_TRAINED_BYTES, _STATE_BYTES = 16, 16
_STATES = 4  # hidden states of a token: three, and the last
_LOGIT_COPIES = 5
# Bytes of an attention score: a share that is kept for the way back, in fp32 and as it is multiplied; and
# what is at hand while one step is made.
_SCORE_KEPT, _SCORE_MADE = 6, 16
_SLACK = 1.15
# Bytes a second that decoding reads of weights: memory, not arithmetic, is what it waits for.
_READ = {"cpu": 8e9, "cuda": 1e12}
# And on accelerators, the interpreter: seconds of a step, however small the model.
_STEP_S = {"cpu": 0.0, "cuda": 0.03}
# Decodings that are compared: plain, with the draft, with the control.
_DECODED = 3


@dataclass(frozen=True)
class DraftPlan:
    """The stage of a plan.

    Attributes:
        spec: what it is told.
        device: ``cpu`` or ``cuda``; results differ in the last bits.
        parameters: of the head; 0 for a draft model.
        held_bytes: of memory, on the device that computes.
        host_bytes: of the host's memory, while the result is loaded.
        stage_bytes: of disk.
        time_s: that it takes.
        model: the plan of the draft model, or None.
    """

    spec: DraftSpec
    device: Device
    parameters: int
    held_bytes: int
    host_bytes: int
    stage_bytes: int
    time_s: float
    model: Plan | None = None

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able, for the stage's key."""
        told = {**self.spec.content, "device": self.device}
        return told if self.model is None else told | {"model": _model_key(self.model)}

    def key(self, assembled: str) -> str:
        """Content key; ``assembled`` is that of the checkpoint."""
        return stage_key("drafts", DRAFT_VERSION, self.content, [assembled])

    def measured_key(self, drafted: str) -> str:
        """Content key of the stage that measures decoding; ``drafted`` is that of the checkpoint with it."""
        told = {**self.spec.measure_content, "device": self.device}
        return stage_key("decode", DECODE_VERSION, told, [drafted])

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with memory, disk and time of the stage."""
        rss = BASE_RSS_BYTES + max(self.host_bytes, self.held_bytes if self.device == "cpu" else 0)
        if self.model is not None:
            rss = max(rss, self.model.prediction.peak_rss_bytes)
        return replace(
            prediction,
            peak_rss_bytes=max(prediction.peak_rss_bytes, rss),
            disk_bytes=prediction.disk_bytes + self.stage_bytes,
            time_s=prediction.time_s + self.time_s,
        )

    def warnings(self) -> list[str]:
        """Whether this machine looks too small, or too slow; what costs acceptance."""
        found = []
        free = available_device_bytes() if self.device == "cuda" else available_memory_bytes()
        if self.held_bytes > free:
            found.append(
                f"drafts take about {self.held_bytes / 1e9:.1f} GB of memory; this machine has "
                f"{free / 1e9:.1f} GB free"
            )
        if self.device == "cpu" and self.time_s > 3600:
            found.append(f"training a draft takes about {self.time_s / 3600:,.0f} hours on this CPU")
        if self.model is not None:
            # What its target keeps of its tokens is what measures it.
            told = [warning for warning in self.model.warnings if warning != UNMEASURED]
            found += [f"draft model: {warning}" for warning in told]
        return found

    def described(self) -> tuple[str, ...]:
        """Lines for people."""
        spec, device = self.spec, "GPU" if self.device == "cuda" else "CPU"
        if self.model is not None:
            kept = self.model.prediction
            return (
                f"{self.model.source.label} proposes {spec.tokens} tokens at a time: "
                f"{kept.parameters / 1e6:,.1f}M weights, {kept.result_bytes / 1e6:,.1f} MB beside the result",
            )
        rows, train = spec.rows, spec.train
        assert rows is not None
        assert train is not None
        whose = "the source's own prediction layer" if spec.kind == "native" else "a new EAGLE-3 head"
        lines = [f"{whose}, {self.parameters / 1e6:,.1f}M numbers, proposes {spec.tokens} tokens at a time"]
        texts = ", ".join(dataset.name for dataset in rows.calibration.datasets)
        if rows.new_tokens and train.steps:
            lines.append(
                f"the compressed model writes {rows.rows * rows.new_tokens / 1e6:,.2f}M tokens after "
                f"stretches of {texts}, at temperature {rows.temperature:g}"
            )
        if train.steps:
            lines.append(
                f"{train.steps:,} steps of {train.batch:,} x {rows.length:,} tokens over {rows.rows:,} rows, "
                f"{train.unroll} tokens ahead, against the compressed model"
            )
        else:
            lines.append(f"as the source has it; measured on {rows.held_out:,} rows of {texts}")
        took = f"about {self.held_bytes / 1e9:,.1f} GB and {duration(self.time_s)} on the {device}"
        return (*lines, f"{took} (estimates)")

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for ``compress plan --json``."""
        return {
            "spec": self.spec.content,
            "measure": None if self.spec.measure is None else self.spec.measure_content,
            "device": self.device,
            "parameters": self.parameters,
            "held_bytes": self.held_bytes,
            "stage_bytes": self.stage_bytes,
            "time_s": self.time_s,
            "model": None if self.model is None else self.model.source.label,
        }


# Recipe of a draft model -> its plan.
PlanModel = Callable[[LoadedRecipe], "Plan"]


def settled_drafts(
    loaded: LoadedRecipe,
    source: Source,
    claims: Sequence[Claim],
    evaluation: EvalSpec | None,
    plan_model: PlanModel,
    faults: list[UserError],
    warnings: list[str],
    *,
    planning: bool,
) -> DraftPlan | None:
    """What is made, if anything is; adds to ``faults`` and ``warnings`` what it finds.

    Args:
        loaded: the recipe.
        source: as it is compressed: its positions scaled.
        claims: of its tensors.
        evaluation: texts that nothing may be trained on.
        plan_model: plans a draft model.
        faults: see above.
        warnings: see above.
        planning: whether Hub datasets need not be reachable.
    """
    section = loaded.recipe.drafts
    if section is None:
        return None
    faults += measure_faults(section, source.config)
    found = kind_faults(section, source, claims)
    if found:
        faults += found
        return None
    if section.kind == "draft_model":
        plan = _model_plan(section, loaded, source, claims, plan_model, faults)
    else:
        own: list[UserError] = []
        spec = collect(
            faults,
            lambda: head_spec(section, loaded, source.config, evaluation, own, warnings, planning=planning),
        )
        # Of texts that weights are calibrated on too, the same has been said.
        told = {fault.render() for fault in faults}
        faults += [fault for fault in own if fault.render() not in told]
        plan = None if spec is None else _head_plan(spec, source, claims)
    warnings += [] if plan is None else plan.warnings()
    return plan


def _model_plan(
    section: DraftsSection,
    loaded: LoadedRecipe,
    source: Source,
    claims: Sequence[Claim],
    plan_model: PlanModel,
    faults: list[UserError],
) -> DraftPlan | None:
    """The plan with a draft model; its vocabulary must have the target's size."""
    assert section.model is not None
    recipe = loaded.recipe
    weights = recipe.weights.without_budget()
    if not section.quantize:
        copied = WeightRule(match="*", scheme="copy")
        weights = WeightsSection(scheme=weights.scheme, rules=(copied,))
    draft = recipe.model_copy(
        update={
            "name": f"{recipe.name}-draft"[:100],
            "model": ModelSection(source=section.model, revision=section.revision),
            "weights": weights,
            "evaluate": None,
            **dict.fromkeys(("context", "adapters", "kv_cache", "drafts", "workspace")),
        }
    )
    try:
        model = plan_model(LoadedRecipe(draft, loaded.path, {}))
    except PlanError as error:
        told = "; ".join(f"{fault.where}: {fault.what}" for fault in error.faults)
        faults.append(UserError(f"the draft model cannot be planned: {told}", where="drafts.model"))
        return None
    except UserError as error:
        # `drafts` has neither `from` nor `headers`.
        fix = error.fix.replace(", or `model.headers` to plan", "")
        fix = "name its 16-bit original" if error.what.startswith("already quantized") else fix
        faults.append(UserError(f"the draft model: {error.what}", where="drafts.model", fix=fix))
        return None
    sizes = [vocabulary_size(config) for config in (source.config, model.source.config)]
    if sizes[0] != sizes[1]:
        faults.append(
            UserError(
                f"the draft model's vocabulary has {sizes[1]:,} tokens, the target's {sizes[0]:,}",
                where="drafts.model",
                fix="name a smaller model of the same family and generation",
            )
        )
        return None
    result = model.prediction.result_bytes
    if model.prediction.parameters >= sum(claim.tensor.numel for claim in claims):
        what = "the draft model is no smaller than the target: no token would come faster"
        faults.append(UserError(what, where="drafts.model", fix="name a smaller one"))
        return None
    spec = DraftSpec("draft_model", section.tokens, measure=measure_spec(section, recipe.seed))
    held = DTYPE_BYTES["float32"] * model.prediction.parameters
    disk, took = model.prediction.disk_bytes + result, model.prediction.time_s
    took += _measure_s(spec.measure, active_parameters(claims, source.config))
    return DraftPlan(spec, planned_device(), 0, held, 0, disk, took, model)


def _head_plan(spec: DraftSpec, source: Source, claims: Sequence[Claim]) -> DraftPlan:
    """What a head costs."""
    rows, train = spec.rows, spec.train
    assert rows is not None
    assert train is not None
    config, device = source.config, planned_device()
    width = DTYPE_BYTES[train.dtype]
    weights = sum(claim.tensor.numel for claim in claims)
    piece = max(rows.length, PIECE_TOKENS[device])
    scores = 0
    if spec.kind == "eagle3":
        shape = shape_for(config, draft_vocabulary=train.vocabulary_size)
        parameters = shape.parameters
        # Of every pair of a row's tokens, at every step.
        scores = piece * rows.length * shape.heads * (_SCORE_KEPT * train.unroll + _SCORE_MADE)
    else:
        parameters = sum(source.headers[name].numel for name in prediction_names(source.headers, config))
    words, wide = vocabulary_size(config), hidden_size(config)
    known = train.vocabulary_size or words
    # One block with its unrolled steps, and a chunk of logits.
    alone = text_config(config) | {"num_hidden_layers": 1}
    block = kept_bytes(alone, piece, 4, recomputed=False) * train.unroll
    chunk = 4 * _LOGIT_COPIES * min(CHUNK_LOGITS[device], piece * words)
    trained = _TRAINED_BYTES * parameters
    cache, _ = kv_bytes(config, rows.length)
    caches = rows.at_once * cache.total_bytes if cache is not None and rows.new_tokens else 0
    # Texts are written before anything is trained.
    held = int(_SLACK * (width * weights + max(caches, trained + block + scores + chunk)))
    # Forward passes of the target; of head and vocabulary three each, one a step ahead.
    active = active_parameters(claims, config)
    ahead = train.unroll * 6 * (parameters + known * wide)
    shown = train.steps * train.batch * rows.length
    measured = (2 + train.steps // train.save_every) * rows.held_out * rows.length
    row_bytes = _STATES * rows.length * wide * width
    kept = min(train.cache_bytes // row_bytes, rows.rows) if row_bytes else 0
    computed = shown if not kept else shown - shown * kept // max(1, rows.rows) + kept * rows.length
    flops = 2 * active * (computed + measured) + ahead * (shown + measured / 3) + 2 * words * wide * shown
    batches = -(-(rows.rows + rows.held_out) // rows.at_once)
    written = (
        batches
        * rows.new_tokens
        * max(_STEP_S[device], width * active / _READ[device], 2 * active * rows.at_once / FLOPS[device])
    )
    return DraftPlan(
        spec=spec,
        device=device,
        parameters=parameters,
        held_bytes=held,
        host_bytes=4 * weights,
        stage_bytes=_STATE_BYTES * parameters
        + 2 * parameters
        + kept * row_bytes
        + 4 * rows.rows * rows.length,
        time_s=flops / FLOPS[device] + written + _measure_s(spec.measure, active),
    )


def _measure_s(spec: DecodeSpec | None, active: float) -> float:
    """Seconds of decoding plainly, with the draft and with a control: once, and against the clock."""
    if spec is None:
        return 0.0
    device = planned_device()
    width = DTYPE_BYTES["bfloat16" if device == "cuda" else "float32"]
    batches = sum(-(-spec.prompts // batch) for batch in spec.batches)
    passes = _DECODED * (1 + spec.runs) * len(spec.domains) * batches * spec.new_tokens
    return passes * max(_STEP_S[device], width * active / _READ[device])


def _model_key(model: Plan) -> str:
    """Content key of the finished draft model."""
    from compressor.planner.keys import stream_key

    return stream_key(model)
