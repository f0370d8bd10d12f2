"""Chooses how the KV cache is stored, layer by layer, and fits what can be fitted.

Legend: N sequences, T tokens, H KV heads, D head_dim, E = H * D.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.base import Source
from compressor.device import available_memory_bytes
from compressor.errors import UserError
from compressor.kv.allocate import Candidate, allocate, allocate_servable
from compressor.kv.base import KvCodec, KvFormat
from compressor.kv.cache import full_attention_layers, spared_layers
from compressor.kv.fit_codec import Coordinates, expected_errors, find_coordinates, fit_codec, token_weights
from compressor.kv.fit_statistics import LayerStatistics, SideStatistics
from compressor.kv.fitted_rotary import RotaryFittedCodec
from compressor.kv.formats import FORMATS
from compressor.kv.plan import BF16, KvPlan, LayerPlan
from compressor.kv.spec import AUTO, KvSpec
from compressor.model.attention_heard import check_hearable, rotary_frequencies
from compressor.model.skeleton import build_skeleton, compute_buffers, library_faults
from compressor.progress import Progress
from compressor.stages.kv_gather import Gathered, Wanted, gather_blocks, gather_whole
from compressor.workspace import write_json

FITTED = "fitted"

_DECIDED_NAME = "fitted_how.json"

_MOST_ROWS = 32768  # of a layer and side: 128 for each centroid
_TRIED = 8  # sequences on which formats are measured
# Parameters, their gradients' way back and the logits, over the bytes of fp32 parameters.
_WHOLE_SHARE = 4.0
_REFERENCE = "int4_per_token_head"
_SIDES = ("keys", "values")
_COMPARED_BITS = 2  # of an element of keys


@dataclass(frozen=True)
class FittedKv:
    """What a fit gives.

    Attributes:
        plan: written to ``kv_plan.json`` and ``kv_plan.tensors``.
        facts: for the report: ``error_of``, what errors are of (``loss`` in nats a token, or ``attention
            output`` relative to itself), ``expected_error``, the sum over layers, and ``tokens_heard``.
    """

    plan: KvPlan
    facts: dict[str, Any]


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
        spec: format ``auto``, or tier ``research``; other formats need no fit.
        ids_NT: calibration tokens, int64.
        folder: exists.
        progress: told the tokens heard.
        device: that computes.

    Raises:
        CheckpointError: latent attention, or attention that cannot be heard.
        UserError: no budget, or one below the smallest choice.
    """
    assert spec.format == AUTO or spec.tier == "research", "a named format is not chosen"
    shape = AttentionShape.of(source)
    gathered = gather(source, spec, shape, ids_NT, device, progress, whole=_decided(source, folder))
    plan, error = choose_plan(spec, shape, gathered, progress)
    plan.write(folder)
    facts = {
        "error_of": "loss" if gathered.gradients else "attention output",
        "expected_error": error,
        "tokens_heard": gathered.tokens,
    }
    return FittedKv(plan, facts)


@dataclass(frozen=True)
class AttentionShape:
    """What is cached.

    Attributes:
        layers: indices of the layers of full attention.
        heads: KV heads of each.
        head_dim: their elements.
        spared: format -> layers that vLLM keeps in 16 bit with it, whatever it is told.
        frequencies_P: of rotary pairs, fp32; None where they are not known.
    """

    layers: tuple[int, ...]
    heads: int
    head_dim: int
    spared: Mapping[str, Collection[int]]
    frequencies_P: torch.Tensor | None = None

    @classmethod
    def of(cls, source: Source) -> AttentionShape:
        """Of a source's model, from its config.

        Raises:
            CheckpointError: latent attention, or a model that cannot be built.
        """
        check_hearable(source)
        model = build_skeleton(source)
        config = model.config
        layers = full_attention_layers(config)
        text = config.get_text_config(decoder=True)
        heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        with library_faults(source.label, "its buffers cannot be computed"):
            compute_buffers(model, set())
        frequencies_P = rotary_frequencies(model)
        if frequencies_P is not None and 2 * len(frequencies_P) > head_dim:
            frequencies_P = None
        spared = {name: spared_layers(config, form) for name, form in FORMATS.items()}
        return cls(tuple(layers), heads, head_dim, spared, frequencies_P)

    @property
    def plain(self) -> LayerPlan:
        """A layer in 16 bit."""
        return LayerPlan(BF16, self.heads, self.head_dim)


def gather(
    source: Source,
    spec: KvSpec,
    shape: AttentionShape,
    ids_NT: torch.Tensor,
    device: torch.device,
    progress: Progress,
    *,
    whole: bool,
) -> Gathered:
    """What a choice rests on, heard with gradients where the ``whole`` model is held in memory.

    Raises:
        CheckpointError: attention that cannot be heard.
    """
    wanted = Wanted(
        layers=shape.layers,
        sink=spec.sink_tokens,
        most_rows=_MOST_ROWS if spec.tier == "research" else 1,
        codecs=_codecs(_tried(spec, shape)),
        tried=_TRIED,
        frequencies_P=shape.frequencies_P if spec.tier == "research" else None,
    )
    if whole:
        return gather_whole(source, ids_NT, wanted, device, progress)
    progress.warn("the model does not fit in memory: KV errors are judged by each layer's own output")
    return gather_blocks(source, ids_NT, wanted, device, progress)


def fits_whole(source: Source) -> bool:
    """Whether there is memory now for the whole model with gradients."""
    parameters = sum(header.numel for header in source.headers.values())
    return 4 * parameters * _WHOLE_SHARE < available_memory_bytes()


def _decided(source: Source, folder: Path) -> bool:
    """``fits_whole``, as it was when the stage began: a run that goes on ends with the same bits."""
    path = folder / _DECIDED_NAME
    if not path.is_file():
        write_json(path, {"whole": fits_whole(source)})
    return bool(json.loads(path.read_text())["whole"])


def choose_plan(
    spec: KvSpec, shape: AttentionShape, gathered: Gathered, progress: Progress
) -> tuple[KvPlan, float]:
    """The plan, and the error that it is expected to cause; see ``FittedKv``.

    Raises:
        UserError: no budget, or one below the smallest choice.
    """
    budget = _budget(spec, shape)
    windows = {"sink_tokens": spec.sink_tokens, "recent_tokens": spec.recent_tokens}
    if spec.tier == "research":
        layers, error = _research(budget, shape, gathered, progress)
        return KvPlan(layers, **windows), error
    formats, costs = _tried(spec, shape), _costs(gathered)
    if spec.tier == "own":
        layers, error = _own(formats, costs, shape, budget)
        return KvPlan(layers, **windows), error
    layers, error = _servable(formats, costs, shape, budget)
    return KvPlan(layers), error  # vLLM has neither sinks nor recent windows


def _tried(spec: KvSpec, shape: AttentionShape) -> dict[str, KvFormat]:
    """Formats whose errors are measured."""
    tiers = {"vllm": {"vllm"}, "own": {"vllm", "own"}, "research": set()}[spec.tier]
    wanted = (
        {name: form for name, form in FORMATS.items() if form.tier in tiers} if spec.format == AUTO else {}
    )
    if spec.tier == "research":
        wanted[_REFERENCE] = FORMATS[_REFERENCE]
    barred = spec.unpaged if spec.tier == "vllm" else ()
    usable = {
        name: form
        for name, form in wanted.items()
        if name not in barred and form.problem(shape.head_dim) is None
    }
    return {name: form for name, form in usable.items() if form.make is not None and name != BF16}


def _codecs(formats: Mapping[str, KvFormat]) -> tuple[dict[str, KvCodec], dict[str, KvCodec]]:
    keys, values = {}, {}
    for name, form in formats.items():
        assert form.make is not None
        keys[name], values[name] = form.make()
    return keys, values


_Costs = Mapping[int, tuple[dict[str, float], dict[str, float]]]


def _costs(gathered: Gathered) -> _Costs:
    """Layer -> format -> what its keys, and its values, do to a token."""
    tokens = gathered.tried_tokens
    return {
        index: (
            {name: error / tokens for name, error in layer.keys.errors.items()},
            {name: error / tokens for name, error in layer.values.errors.items()},
        )
        for index, layer in gathered.layers.items()
    }


def _servable(
    formats: Mapping[str, KvFormat], costs: _Costs, shape: AttentionShape, budget: int
) -> tuple[dict[int, LayerPlan], float]:
    """One format for vLLM, and skipped layers."""
    size = {name: shape.heads * form.slot_bytes(shape.head_dim) for name, form in formats.items()}
    options = {
        index: {name: Candidate(name, size[name], keys[name] + values[name]) for name in formats}
        for index, (keys, values) in costs.items()
    }
    plain = {index: Candidate(BF16, shape.plain.token_bytes, 0.0) for index in shape.layers}
    found = allocate_servable(options, plain, shape.spared, budget)
    keys, values = _codecs({found.format: formats[found.format]})
    packed = LayerPlan(found.format, shape.heads, shape.head_dim, keys[found.format], values[found.format])
    layers = {index: shape.plain if index in found.skipped else packed for index in shape.layers}
    return layers, found.allocation.cost


def _own(
    formats: Mapping[str, KvFormat], costs: _Costs, shape: AttentionShape, budget: int
) -> tuple[dict[int, LayerPlan], float]:
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
    return layers, allocation.cost


@dataclass(frozen=True)
class _Side:
    """Keys or values of a layer: what was heard, their coordinates, and by what keys are turned back."""

    heard: SideStatistics
    weights_N: torch.Tensor
    coordinates: Coordinates
    frequencies_P: torch.Tensor | None = None

    @classmethod
    def of(cls, heard: SideStatistics, frequencies_P: torch.Tensor | None = None) -> _Side:
        weights_N = token_weights(heard.counts_N)
        found = find_coordinates(heard.rows_NE, weights_N, heard.metric_EE / heard.tokens)
        return cls(heard, weights_N, found, frequencies_P)

    def codec(self, token_bytes: int, heads: int) -> KvCodec:
        made = fit_codec(
            self.coordinates, self.heard.rows_NE, self.weights_N, token_bytes=token_bytes, kv_heads=heads
        )
        return made if self.frequencies_P is None else RotaryFittedCodec.of(made, self.frequencies_P)


def _research(
    budget: int, shape: AttentionShape, gathered: Gathered, progress: Progress
) -> tuple[dict[int, LayerPlan], float]:
    """Fitted codecs; bytes are shared out between layers, and between keys and values."""
    elements = shape.heads * shape.head_dim
    found: dict[int, _Side] = {}
    options: dict[int, list[Candidate]] = {}
    for index, layer in sorted(gathered.layers.items()):
        sides = (_keys(layer, shape), _Side.of(layer.values))
        for number, (side, plain) in enumerate(zip(sides, (layer.keys, layer.values), strict=True)):
            worth = 0.5 if gathered.gradients else _worth(plain, layer, gathered)
            errors = worth * expected_errors(side.coordinates.spread_C, elements)
            found[2 * index + number] = side
            options[2 * index + number] = [
                Candidate(str(slot), slot * shape.heads, float(errors[slot * shape.heads]))
                for slot in range(1, shape.head_dim + 1)
            ]
    allocation = allocate(options, budget)
    progress.start("kv codecs", len(options), "items")
    codecs: dict[int, KvCodec] = {}
    for place, side in found.items():
        codecs[place] = side.codec(allocation.chosen[place].token_bytes, shape.heads)
        progress.advance(1, f"layer {place // 2} {_SIDES[place % 2]}")
    progress.finish()
    layers = {
        index: LayerPlan(FITTED, shape.heads, shape.head_dim, codecs[2 * index], codecs[2 * index + 1])
        for index in shape.layers
    }
    return layers, allocation.cost


def _keys(layer: LayerStatistics, shape: AttentionShape) -> _Side:
    """Keys as they are or turned back, whichever leaves less error."""
    plain = _Side.of(layer.keys)
    if layer.turned_keys is None:
        return plain
    turned = _Side.of(layer.turned_keys, shape.frequencies_P)
    compared = max(1, shape.heads * shape.head_dim * _COMPARED_BITS // 8)
    errors = [
        float(expected_errors(side.coordinates.spread_C, compared)[compared]) for side in (plain, turned)
    ]
    return plain if errors[0] <= errors[1] else turned


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
    return side.errors[_REFERENCE] / gathered.tried_tokens / max(expected, 1e-30)


def _budget(spec: KvSpec, shape: AttentionShape) -> int:
    if spec.budget_bytes_per_token is not None:
        return spec.budget_bytes_per_token
    if spec.format == AUTO:
        raise UserError("format: auto needs a budget", where="kv_cache.budget")
    return len(shape.layers) * shape.heads * FORMATS.find(spec.format).slot_bytes(shape.head_dim)
