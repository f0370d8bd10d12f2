"""Chooses how the KV cache is stored, layer by layer, and fits what can be fitted: the plan and its numbers.

Legend: N sequences, T tokens, H KV heads, D head_dim, E = H * D, P = D / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.base import Source
from compressor.device import available_memory_bytes
from compressor.errors import UserError
from compressor.kv.allocate import Candidate, allocate, allocate_servable
from compressor.kv.base import KvCodec, KvFormat
from compressor.kv.cache import full_attention_layers
from compressor.kv.fit_codec import Coordinates, expected_errors, find_coordinates, fit_codec, token_weights
from compressor.kv.fit_pairs import pair_scales
from compressor.kv.fit_statistics import LayerStatistics, SideStatistics
from compressor.kv.formats import FORMATS
from compressor.kv.fp8 import Fp8Codec
from compressor.kv.plan import BF16, ENGINE_BYTES, KvPlan, LayerPlan
from compressor.kv.spec import AUTO, KvSpec
from compressor.model.attention_heard import check_hearable
from compressor.model.skeleton import build_skeleton
from compressor.numerics.fp8 import E4M3_MAX
from compressor.progress import Progress
from compressor.stages.kv_gather import Gathered, Wanted, gather_blocks, gather_whole

STATISTICS_NAME = "kv_statistics.safetensors"
FITTED = "fitted"

_MOST_ROWS = 65536  # of a layer and side: 256 for each centroid
_TRIED = 8  # sequences on which formats are measured
# Parameters, their gradients' way back and the logits, over the bytes of fp32 parameters.
_WHOLE_SHARE = 4.0
_REFERENCE = "int4_per_token_head"
_SIDES = ("keys", "values")


@dataclass(frozen=True)
class FittedKv:
    """What a fit gives.

    Attributes:
        plan: written to ``kv_plan.json`` and ``kv_plan.safetensors``.
        facts: numbers for the report: how errors were measured, expected error, bytes, bits, by layer.
        key_largest: layer -> fp32 [H], the largest magnitude of the keys; over 448, an e4m3 scale. Written to
            ``kv_statistics.safetensors`` with the two others; empty where nothing was calibrated.
        value_largest: the same of the values.
        pair_scales: layer -> fp64 [H, P], see ``kv.fit_pairs``; only layers with an even head_dim.
    """

    plan: KvPlan
    facts: dict[str, Any]
    key_largest: dict[int, torch.Tensor]
    value_largest: dict[int, torch.Tensor]
    pair_scales: dict[int, torch.Tensor]


def fit_kv(
    source: Source,
    spec: KvSpec,
    ids_NT: torch.Tensor,
    folder: Path,
    progress: Progress,
    device: torch.device,
) -> FittedKv:
    """Listens to the model, chooses, fits, and writes the plan into ``folder``.

    Args:
        source: the checkpoint whose cache it is, with whatever is folded into its weights.
        spec: what is asked for.
        ids_NT: calibration tokens, int64; not read without ``spec.calibrate``.
        folder: exists.
        progress: told the tokens heard.
        device: that computes.

    Raises:
        CheckpointError: latent attention, or attention that cannot be heard.
        UserError: a budget below the smallest choice, or a format that the heads do not allow.
    """
    check_hearable(source)
    config = build_skeleton(source).config
    layers = full_attention_layers(config)
    text = config.get_text_config(decoder=True)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    shape = _Shape(tuple(layers), heads, head_dim, dense=len(layers) == text.num_hidden_layers)
    gathered = None
    if spec.calibrate:
        gathered = _gather(source, _wanted(spec, shape), ids_NT, device, progress)
    plan, error = _chosen(spec, shape, gathered, min(_TRIED, len(ids_NT)) * ids_NT.shape[-1], progress)
    plan.write(folder)
    heard = gathered.layers if gathered is not None else {}
    made = FittedKv(
        plan,
        _facts(plan, gathered, error),
        {index: layer.keys.largest_H for index, layer in heard.items()},
        {index: layer.values.largest_H for index, layer in heard.items()},
        {i: pair_scales(x.query_HDD, x.key_HDD) for i, x in heard.items() if head_dim % 2 == 0},
    )
    _write_statistics(made, folder)
    return made


@dataclass(frozen=True)
class _Shape:
    """Layers of full attention by index, their KV heads and head_dim; ``dense``: no other layers."""

    layers: tuple[int, ...]
    heads: int
    head_dim: int
    dense: bool

    @property
    def plain(self) -> LayerPlan:
        return LayerPlan(BF16, self.heads, self.head_dim)

    def forced(self, form: KvFormat) -> tuple[int, ...]:
        """What vLLM keeps in 16 bit with this format, whatever it is told."""
        ends = form.skips_ends if self.dense else 0
        return tuple(sorted({*self.layers[:ends], *self.layers[len(self.layers) - ends :]}))


def _tried(spec: KvSpec, shape: _Shape) -> dict[str, KvFormat]:
    """Formats whose errors are measured."""
    tiers = {"vllm": {"vllm"}, "own": {"vllm", "own"}, "research": set()}[spec.tier]
    wanted = (
        {name: form for name, form in FORMATS.items() if form.tier in tiers} if spec.format == AUTO else {}
    )
    if spec.tier == "research":
        wanted[_REFERENCE] = FORMATS[_REFERENCE]
    usable = {name: form for name, form in wanted.items() if form.problem(shape.head_dim) is None}
    return {name: form for name, form in usable.items() if form.make is not None and name != BF16}


def _codecs(formats: Mapping[str, KvFormat]) -> tuple[dict[str, KvCodec], dict[str, KvCodec]]:
    keys, values = {}, {}
    for name, form in formats.items():
        assert form.make is not None
        keys[name], values[name] = form.make()
    return keys, values


def _wanted(spec: KvSpec, shape: _Shape) -> Wanted:
    rows = _MOST_ROWS if spec.tier == "research" else 1
    return Wanted(shape.layers, spec.sink_tokens, rows, _codecs(_tried(spec, shape)), _TRIED)


def _gather(
    source: Source, wanted: Wanted, ids_NT: torch.Tensor, device: torch.device, progress: Progress
) -> Gathered:
    """With gradients where the whole model fits."""
    parameters = sum(header.numel for header in source.headers.values())
    if 4 * parameters * _WHOLE_SHARE < available_memory_bytes():
        return gather_whole(source, ids_NT, wanted, device, progress)
    progress.warn("the model does not fit in memory: KV errors are judged by each layer's own output")
    return gather_blocks(source, ids_NT, wanted, device, progress)


def _chosen(
    spec: KvSpec, shape: _Shape, gathered: Gathered | None, tried_tokens: int, progress: Progress
) -> tuple[KvPlan, float | None]:
    """The plan, and the expected error of an allocation."""
    windows = {"sink_tokens": spec.sink_tokens, "recent_tokens": spec.recent_tokens}
    if spec.tier == "research":
        if gathered is None:
            raise UserError("fitted KV formats need texts", fix="set kv_cache.calibrate: true")
        layers, error = _research(_budget(spec, shape), shape, gathered, progress)
        return KvPlan(layers, **windows), error
    if spec.format != AUTO:
        return KvPlan(_named(spec, shape, gathered), **windows), None
    if gathered is None:
        raise UserError("format: auto measures formats on texts", fix="set kv_cache.calibrate: true")
    formats = _tried(spec, shape)
    costs = {
        index: tuple({n: e / tried_tokens for n, e in side.errors.items()} for side in (x.keys, x.values))
        for index, x in gathered.layers.items()
    }
    budget = _budget(spec, shape)
    if spec.tier == "vllm":
        return _servable(formats, costs, shape, budget)
    return _own(formats, costs, shape, budget, windows)


_Costs = Mapping[int, tuple[dict[str, float], ...]]


def _servable(
    formats: Mapping[str, KvFormat], costs: _Costs, shape: _Shape, budget: int
) -> tuple[KvPlan, float]:
    """One format for vLLM, and skipped layers; vLLM has neither sinks nor recent windows."""
    size = {name: shape.heads * form.slot_bytes(shape.head_dim) for name, form in formats.items()}
    options = {
        index: {name: Candidate(name, size[name], keys[name] + values[name]) for name in formats}
        for index, (keys, values) in costs.items()
    }
    plain = {index: Candidate(BF16, shape.plain.token_bytes, 0.0) for index in shape.layers}
    forced = {name: shape.forced(form) for name, form in formats.items()}
    found = allocate_servable(options, plain, forced, budget)
    keys, values = _codecs({found.format: formats[found.format]})
    packed = LayerPlan(found.format, shape.heads, shape.head_dim, keys[found.format], values[found.format])
    layers = {index: shape.plain if index in found.skipped else packed for index in shape.layers}
    return KvPlan(layers), found.allocation.cost


def _own(
    formats: Mapping[str, KvFormat], costs: _Costs, shape: _Shape, budget: int, windows: dict[str, int]
) -> tuple[KvPlan, float]:
    """Any format's keys with any format's values in each layer, or 16 bit."""
    key_codecs, value_codecs = _codecs(formats)
    options = {}
    for index, (keys, values) in costs.items():
        pairs = [
            Candidate(
                f"{key}/{value}",
                shape.heads
                * (formats[key].key_bytes(shape.head_dim) + formats[value].value_bytes(shape.head_dim)),
                keys[key] + values[value],
            )
            for key in formats
            for value in formats
        ]
        options[index] = [Candidate(BF16, shape.plain.token_bytes, 0.0), *pairs]
    allocation = allocate(options, budget)
    layers = {}
    for index, candidate in allocation.chosen.items():
        key, _, value = candidate.name.partition("/")
        name = key if key == value else candidate.name
        layers[index] = (
            shape.plain
            if not value
            else LayerPlan(name, shape.heads, shape.head_dim, key_codecs[key], value_codecs[value])
        )
    return KvPlan(layers, **windows), allocation.cost


def _named(spec: KvSpec, shape: _Shape, gathered: Gathered | None) -> dict[int, LayerPlan]:
    """One format for all layers but those that vLLM keeps; fp8 with scales where texts were heard."""
    form = FORMATS.find(spec.format)
    problem = form.problem(shape.head_dim)
    if problem is not None or form.make is None:
        raise UserError(problem or f"{form.name} is a format of tier research", where="kv_cache.format")
    kept = shape.layers if form.name == BF16 else shape.forced(form)
    layers = {}
    for index in shape.layers:
        keys, values = form.make()
        if form.name == "fp8" and gathered is not None:
            heard = gathered.layers[index]
            keys, values = (Fp8Codec(_fp8_scale(side)) for side in (heard.keys, heard.values))
        packed = LayerPlan(form.name, shape.heads, shape.head_dim, keys, values)
        layers[index] = shape.plain if index in kept else packed
    return layers


def _fp8_scale(side: SideStatistics) -> torch.Tensor:
    """fp32 []: one scale for the layer, so that its largest magnitude is e4m3's."""
    largest = side.largest_H.max()
    return largest / E4M3_MAX if largest > 0 else torch.ones(())


def _research(
    budget: int, shape: _Shape, gathered: Gathered, progress: Progress
) -> tuple[dict[int, LayerPlan], float]:
    """Fitted codecs; bytes are shared out between layers, and between keys and values."""
    found: dict[tuple[int, str], Coordinates] = {}
    options: dict[int, list[Candidate]] = {}
    for index, layer in sorted(gathered.layers.items()):
        for number, name in enumerate(_SIDES):
            side: SideStatistics = getattr(layer, name)
            weights_N = token_weights(side.counts_N)
            place = found[index, name] = find_coordinates(
                side.rows_NE, weights_N, side.metric_EE / side.tokens
            )
            worth = 0.5 if gathered.gradients else _worth(side, layer, gathered)
            errors = worth * expected_errors(place.spread_C, shape.heads * shape.head_dim)
            options[2 * index + number] = [
                Candidate(str(slot), slot * shape.heads, float(errors[slot * shape.heads]))
                for slot in range(1, shape.head_dim + 1)
            ]
    allocation = allocate(options, budget)
    progress.start("kv codecs", len(options), "items")
    codecs: dict[tuple[int, str], KvCodec] = {}
    for (index, name), place in found.items():
        side = getattr(gathered.layers[index], name)
        candidate = allocation.chosen[2 * index + _SIDES.index(name)]
        codecs[index, name] = fit_codec(
            place,
            side.rows_NE,
            token_weights(side.counts_N),
            token_bytes=candidate.token_bytes,
            kv_heads=shape.heads,
        )
        progress.advance(1, f"layer {index} {name}")
    progress.finish()
    layers = {
        index: LayerPlan(FITTED, shape.heads, shape.head_dim, codecs[index, "keys"], codecs[index, "values"])
        for index in shape.layers
    }
    return layers, allocation.cost


def _worth(side: SideStatistics, layer: LayerStatistics, gathered: Gathered) -> float:
    """What a unit of the metric's error does to the attention's output: as the reference codec shows it."""
    codec = FORMATS[_REFERENCE].make
    assert codec is not None
    keys, values = codec()
    rows_NE = side.rows_NE
    rows_BHTD = rows_NE.view(1, len(rows_NE), layer.heads, layer.head_dim).transpose(1, 2)
    used = keys if side is layer.keys else values
    moved = used.decode(used.encode(rows_BHTD), layer.head_dim, torch.float32) - rows_BHTD
    e_NE = moved.transpose(1, 2).flatten(2)[0].double()
    expected = float(((e_NE @ (side.metric_EE / side.tokens)) * e_NE).sum(-1).mean())
    return side.errors[_REFERENCE] / max(expected, 1e-30)


def _budget(spec: KvSpec, shape: _Shape) -> int:
    if spec.budget_bytes_per_token is not None:
        return spec.budget_bytes_per_token
    if spec.format == AUTO:
        raise UserError("format: auto needs a budget", where="kv_cache.budget")
    return len(shape.layers) * shape.heads * FORMATS.find(spec.format).slot_bytes(shape.head_dim)


def _facts(plan: KvPlan, gathered: Gathered | None, error: float | None) -> dict[str, Any]:
    return {
        "token_bytes": plan.token_bytes,
        "bits": plan.bits,
        "tokens_heard": gathered.tokens if gathered is not None else 0,
        "error_of": None if gathered is None else "loss" if gathered.gradients else "attention output",
        "expected_error": error,
        "layers": [
            {
                "layer": index,
                "format": layer.format,
                "key_bytes": _side_bytes(layer.keys, layer),
                "value_bytes": _side_bytes(layer.values, layer),
            }
            for index, layer in sorted(plan.layers.items())
        ],
    }


def _side_bytes(codec: KvCodec | None, layer: LayerPlan) -> int:
    return layer.head_dim * ENGINE_BYTES if codec is None else codec.slot_bytes(layer.head_dim)


def _write_statistics(made: FittedKv, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        f"{index}.{name}": tensor.float().contiguous()
        for name, of in (
            ("key_largest", made.key_largest),
            ("value_largest", made.value_largest),
            ("pair_scales", made.pair_scales),
        )
        for index, tensor in of.items()
    }
    if tensors:
        save_file(tensors, folder / STATISTICS_NAME)
