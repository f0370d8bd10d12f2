"""The stage before the weights: what is folded for the KV cache, how each layer is stored, static scales.

One pass of the calibration tokens hears keys, values and queries. From it come factors for rotary pairs,
folded into the weights together with a rotation of the values; the largest magnitudes, for static FP8 scales;
and the plan of the cache, layer by layer. What is folded is tried on a block first.

Legend: H sets of factors, P = D / 2 pairs, D head_dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.checkpoint.folded import FoldedSource, KvFold
from compressor.kv.formats import FORMATS
from compressor.kv.spec import KvSpec
from compressor.model.kv_folding import Foldable, foldable
from compressor.progress import Progress
from compressor.spec import TensorHeader
from compressor.stages.kv_fold import sound_fold
from compressor.stages.kv_heard import LayerHeard, hear_layers
from compressor.stages.tokens import Shown, calibration_tokens
from compressor.stages.walk import WalkSpec
from compressor.workspace import write_json

if TYPE_CHECKING:
    import torch

    from compressor.kv.base import KvCodec
    from compressor.kv.plan import KvPlan

SCALES_NAME = "kv_scales.safetensors"
FP8 = "fp8"
_BF16 = "bf16"
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class FullLayer:
    """A layer with full attention, and the format that it has."""

    index: int
    kv_heads: int
    head_dim: int
    format: str


@dataclass(frozen=True)
class KvJob:
    """What the stage is told.

    Attributes:
        spec: what the recipe asks for.
        layers: those with full attention, in order.
        fold_values: layers whose values are rotated.
        fold_keys: layers whose keys are scaled.
        scales: layers with any attention -> names of the static scales of their keys and values; empty where
            there are none.
        walk: how the pass computes; None where nothing is heard.
    """

    spec: KvSpec
    layers: tuple[FullLayer, ...]
    fold_values: tuple[int, ...]
    fold_keys: tuple[int, ...]
    scales: Mapping[int, tuple[str, str]]
    walk: WalkSpec | None

    @property
    def folds(self) -> bool:
        """Whether the weights may be changed."""
        return bool(self.fold_values or self.fold_keys)

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able: everything but where the pass keeps its states, which depends on the machine."""
        told = asdict(replace(self, walk=None)) | {
            "walk": self.walk and [self.walk.batch_tokens, self.walk.dtype]
        }
        return dict(json.loads(json.dumps(told)))

    def scale_headers(self) -> list[TensorHeader]:
        """The tensors of static scales."""
        return [TensorHeader(name, "F32", (1,)) for names in self.scales.values() for name in names]


def kv_stage(
    source: Source, job: KvJob, calibration: CalibrationSpec | None, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Leaves the plan, the fold and the scales in ``folder``; facts for the report: ``resumed``, ``kv``.

    Raises:
        CheckpointError: the model cannot be walked, or its attention not be heard.
        UserError: a text cannot be read or is too short; the disk is full.
    """
    heard: dict[int, LayerHeard] = {}
    facts: dict[str, Any] = {"texts": {}}
    layers = {*job.fold_keys, *job.scales}
    resumed = any(folder.glob("heard-*.safetensors"))
    shown = None
    if job.walk is not None:
        assert calibration is not None, "the plan says on what"
        shown = calibration_tokens(source, calibration, folder, progress)
        facts["texts"] = shown.counts
        if layers:
            heard = hear_layers(source, shown.ids_NT, layers, job.walk, folder, progress)
    fold = _fold(source, job, heard, progress)
    if fold:
        fold.write(folder)
    if job.spec.fits:
        plan, fitted = _fit(source, job, fold, shown, folder, progress)
        facts |= fitted
    else:
        plan = _given_plan(job, heard, fold)
        plan.write(folder)
    if job.scales:
        _write_scales(job, heard, fold, folder)
    facts |= {
        "token_bytes": plan.token_bytes,
        "bits": plan.bits,
        "formats": {str(index): layer.format for index, layer in plan.layers.items()},
        "folded_values": sorted(fold.values),
        "folded_keys": sorted(fold.keys),
    }
    write_json(folder / "facts.json", facts)
    return {"resumed": resumed, "kv": facts}


def _fold(source: Source, job: KvJob, heard: Mapping[int, LayerHeard], progress: Progress) -> KvFold:
    """What is folded, once it was tried."""
    if not job.folds:
        return KvFold()
    can = foldable(source.headers, source.config)
    keys = {layer: key_factors(heard[layer], can) for layer in job.fold_keys}
    return sound_fold(source, KvFold(job.fold_values, keys), progress)


def key_factors(heard: LayerHeard, can: Foldable) -> torch.Tensor:
    """fp32 [H, D]: what ``pair_scales`` makes of what was heard, for all heads together where they share it.

    Coordinates that RoPE does not turn are taken in pairs as well.
    """
    import torch

    from compressor.kv.fit_pairs import pair_scales

    query_HDD, key_HDD = heard.query_HDD, heard.key_HDD
    if can.key_heads == 1:
        query_HDD, key_HDD = query_HDD.sum(0, keepdim=True), key_HDD.sum(0, keepdim=True)
    turned, half = can.rotary_dim, can.head_dim // 2
    first, rest = turned // 2, can.head_dim - turned
    order = [*range(first), *range(turned, turned + rest // 2)]
    order += [*range(first, turned), *range(turned + rest // 2, can.head_dim)]
    order_D = torch.tensor(order)
    assert len(order) == 2 * half, "head_dim is even"
    factor_HP = pair_scales(query_HDD[:, order_D][:, :, order_D], key_HDD[:, order_D][:, :, order_D])
    factor_HD = torch.empty(can.key_heads, can.head_dim)
    factor_HD[:, order_D] = torch.cat([factor_HP, factor_HP], dim=1).float()
    return factor_HD


def _fit(
    source: Source, job: KvJob, fold: KvFold, shown: Shown | None, folder: Path, progress: Progress
) -> tuple[KvPlan, dict[str, Any]]:
    """The plan where formats are chosen or fitted, and how."""
    from compressor.device import pick_device
    from compressor.stages.kv_fit import fit_kv

    assert shown is not None, "the plan asks for texts"
    folded = FoldedSource(source, fold) if fold else source
    made = fit_kv(folded, job.spec, shown.ids_NT, folder, progress, pick_device())
    told = {name: made.facts[name] for name in ("error_of", "expected_error")}
    return made.plan, told


def _given_plan(job: KvJob, heard: Mapping[int, LayerHeard], fold: KvFold) -> KvPlan:
    """The plan where the recipe names the format."""
    from compressor.kv.plan import KvPlan, LayerPlan

    layers = {}
    for layer in job.layers:
        keys: KvCodec | None = None
        values: KvCodec | None = None
        if layer.format != _BF16:
            keys, values = _codecs(layer, job, heard, fold)
        layers[layer.index] = LayerPlan(layer.format, layer.kv_heads, layer.head_dim, keys, values)
    return KvPlan(layers, job.spec.sink_tokens, job.spec.recent_tokens)


def _codecs(
    layer: FullLayer, job: KvJob, heard: Mapping[int, LayerHeard], fold: KvFold
) -> tuple[KvCodec, KvCodec]:
    if layer.format == FP8 and layer.index in job.scales:
        from compressor.kv.fp8 import Fp8Codec

        key, value = _static_scales(heard[layer.index], layer.index, fold)
        return Fp8Codec(key), Fp8Codec(value)
    make = FORMATS[layer.format].make
    assert make is not None, "a format that is named is not fitted"
    return make()


def _static_scales(heard: LayerHeard, index: int, fold: KvFold) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 scales of a layer's keys and of its values: the largest magnitude becomes e4m3's."""
    import torch

    key_HD, value_HD = heard.key_HD, heard.rotated_HD if index in fold.values else heard.value_HD
    if index in fold.keys:
        key_HD = key_HD * fold.keys[index].double()

    def scale(peak_HD: torch.Tensor) -> torch.Tensor:
        largest = float(peak_HD.max()) / _E4M3_MAX
        return torch.tensor(largest if largest > 0 else 1.0, dtype=torch.float32)

    return scale(key_HD), scale(value_HD)


def _write_scales(job: KvJob, heard: Mapping[int, LayerHeard], fold: KvFold, folder: Path) -> None:
    from compressor.checkpoint.safetensors_writer import ShardWriter

    with ShardWriter(folder / SCALES_NAME, job.scale_headers()) as writer:
        for index, names in job.scales.items():
            for name, scale in zip(names, _static_scales(heard[index], index, fold), strict=True):
                writer.write(name, scale.reshape(1))
