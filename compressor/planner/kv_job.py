"""What the stage ``kv`` will do: the pass over the calibration texts, folds, static scales, and its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.dialects.base import Dialect
from compressor.kv.base import KvFormat
from compressor.kv.formats import FORMATS
from compressor.kv.spec import AUTO, KvSpec
from compressor.model.kv_folding import Foldable, attention_modules, foldable
from compressor.planner.calibrated import WalkPlan, plan_walk
from compressor.planner.kv_bytes import KvLayer, kv_layers
from compressor.planner.kv_choice import BF16, format_map
from compressor.planner.predict import Prediction
from compressor.stages.base import Claim
from compressor.stages.kv import FP8, FullLayer, KvJob
from compressor.workspace import stage_key

KV_VERSION = 1
# Values that are stored between their least and largest, or rotated by nobody, gain by a rotation; those of
# formats that rotate them themselves, or store floating point, do not.
_ROTATE = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
# Keys that are rotated as a whole before they are stored share their error among all pairs.
_SCALE = ("turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc", "int4_per_token_head")
_SCALE_FAMILIES = ("turboquant_mse_", "turboquant_prod_", "turboquant_2.5", "turboquant_3.5")


@dataclass(frozen=True)
class KvStage:
    """The stage of a plan.

    Attributes:
        job: what it is told.
        walk: its pass over the texts, or None where nothing is heard.
        calibration: the texts of that pass.
        notes: what is folded, and what is not and why, for people.
    """

    job: KvJob
    walk: WalkPlan | None
    calibration: CalibrationSpec | None
    notes: tuple[str, ...]

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with the scales' bytes, and with memory, disk and time of the pass."""
        scales = sum(header.nbytes for header in self.job.scale_headers())
        prediction = replace(prediction, result_bytes=prediction.result_bytes + scales)
        return prediction if self.walk is None else self.walk.add_to(prediction)

    def key(self, source: str) -> str:
        """Content key; ``source`` is the source's."""
        spec = {
            "job": self.job.content,
            "calibration": self.calibration and self.calibration.content,
            "device": self.walk and self.walk.device,
        }
        return stage_key("kv", KV_VERSION, spec, [source])

    def weights_source(self, source: str) -> str:
        """The key of what the stages after it read: the folded source's, or still the source's own."""
        return self.key(source) if self.job.folds else source


def plan_kv_stage(
    spec: KvSpec,
    source: Source,
    claims: Sequence[Claim],
    calibration: CalibrationSpec | None,
    dialect: Dialect,
    *,
    oneshot: bool,
    needs_data: bool,
    most_memory: int | None,
) -> KvStage:
    """The stage; ``oneshot``: whether llm-compressor reads the source by itself."""
    config = source.config
    layers, _ = kv_layers(config)
    formats: Mapping[int, KvFormat] = {}
    if spec.format != AUTO:
        formats = format_map(layers, config, FORMATS[spec.format])
    full = tuple(
        FullLayer(layer.index, layer.heads, layer.head_dim, _name(layer, formats, spec))
        for layer in layers
        if layer.kind == "full"
    )
    values, keys, notes = _folds(spec, full, source, claims, oneshot=oneshot, heard=needs_data)
    scales: dict[int, tuple[str, str]] = {}
    if spec.format == FP8 and needs_data:
        scales, missing = _scales(layers, source, dialect)
        notes += missing
    walk = None
    if calibration is not None and (keys or scales or spec.fits):
        # The same pass, whatever becomes of the weights.
        plain = [replace(claim, scheme=None, solver=None) for claim in claims]
        walk = plan_walk(plain, calibration, config, most_memory)
    job = KvJob(spec, full, values, keys, scales, None if walk is None else walk.walk)
    return KvStage(job, walk, None if walk is None else calibration, tuple(notes))


def _name(layer: KvLayer, formats: Mapping[int, KvFormat], spec: KvSpec) -> str:
    if spec.format == AUTO:
        return AUTO
    return formats[layer.index].name if layer.index in formats else BF16


def _folds(
    spec: KvSpec,
    full: Sequence[FullLayer],
    source: Source,
    claims: Sequence[Claim],
    *,
    oneshot: bool,
    heard: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """Layers whose values are rotated, layers whose keys are scaled, and what to say of both."""
    if not spec.fold:
        return (), (), []
    wanted = [layer.index for layer in full if layer.format != BF16]
    # Fitted codecs have transforms of their own.
    chosen = spec.format == AUTO and spec.tier != "research"
    rotate = chosen or spec.format in _ROTATE
    scale = chosen or spec.format in _SCALE or spec.format.startswith(_SCALE_FAMILIES)
    if not rotate and not scale:
        return (), (), []
    can = _foldable(source, claims, oneshot=oneshot)
    notes = []
    values = tuple(layer for layer in wanted if rotate and layer in can.values)
    keys = tuple(layer for layer in wanted if scale and heard and layer in can.keys)
    if rotate:
        notes.append(_note("values", "rotated", values, wanted, can.no_values))
    if scale:
        unheard = "" if heard else "calibrate is false"
        notes.append(_note("keys", "scaled", keys, wanted, can.no_keys or unheard))
    return values, keys, notes


def _note(what: str, done: str, layers: Sequence[int], wanted: Sequence[int], reason: str) -> str:
    if not layers:
        return f"{what} are not {done}: {reason or 'no layer allows it'}"
    return f"{what} of {len(layers)} of {len(wanted)} layers are {done} inside the weights"


def _foldable(source: Source, claims: Sequence[Claim], *, oneshot: bool) -> Foldable:
    """What can be folded, unless somebody else reads the source's weights."""
    reason = ""
    if oneshot:
        reason = "solver llmcompressor reads the source by itself"
    elif any(claim.kept is not None for claim in claims):
        reason = "model.from: keep carries the source's weights as they are"
    can = foldable(source.headers, source.config)
    return Foldable(no_values=reason, no_keys=reason) if reason else can


def _scales(
    layers: Sequence[KvLayer], source: Source, dialect: Dialect
) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """Layer -> names of its static scales; none, and why, where they have no names."""
    modules = attention_modules(source.headers, source.config)
    attention = [layer.index for layer in layers if layer.kind in ("full", "sliding", "chunked")]
    if not all(index in modules for index in attention):
        return {}, ["no static FP8 scales: the attention modules have names that engines map none to"]
    return {index: dialect.kv_scales(modules[index]) for index in attention}, []


def kv_weights_source(stage: KvStage | None, fingerprint: str) -> str:
    """``KvStage.weights_source``, or the source's own key without a stage."""
    return fingerprint if stage is None else stage.weights_source(fingerprint)
