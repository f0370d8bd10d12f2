"""The parts of a model in a report: bytes by what a tensor is for, and how each layer is stored."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.model.families.naming import block_index, is_prediction, is_tower
from compressor.planner.sizes import is_routed
from compressor.report.record import Count, Measure, Record
from compressor.report.words import number, percent, size

if TYPE_CHECKING:
    from compressor.spec import Role
    from compressor.stages.base import Claim

PART_HEADS = ("part", "stored as", "tensors", "before", "after", "of the result")
PLAIN = "16 bit"
PREDICTION, TOWERS = "prediction layers", "towers"
# In the order of a forward pass; what a tensor's name does not tell is the last.
PARTS = (
    *("embedding", "attention", "states", "MLP", "shared experts", "routed experts", "routers", PREDICTION),
    *("output head", TOWERS, "norms", "other"),
)
_LOOKUPS = {"embedding": "embedding", "lm_head": "output head"}
# Part -> words of a tensor's name; the first that fits.
_MODULES = {
    "shared experts": {"shared_expert", "shared_experts"},
    "states": {"linear_attn", "mamba", "mixer", "conv", "ssm", "linear_attention"},
    "attention": {"self_attn", "attn", "attention", "self_attention", "cross_attn"},
    "MLP": {"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"},
}


class PartBytes(Record):
    """Tensors of one part of the model that are stored alike.

    Attributes:
        part: one of ``PARTS``.
        scheme: label of their scheme, or ``16 bit``.
        tensors: source tensors.
        source_bytes: of these in 16 bit.
        bytes: in the result, scales included.
    """

    part: str
    scheme: str
    tensors: Count
    source_bytes: Count
    bytes: Count


class LayerMatrix(Record):
    """A matrix of one layer, or the same matrix of all experts of the layer.

    Attributes:
        layer: index of the block, or None outside of blocks.
        matrix: its name within the block, without the expert's number: ``mlp.experts.up_proj``.
        scheme: how it is stored; ``16 bit`` where it is not quantized; ``mixed`` where experts differ.
        parameters: its weights.
        bits: 8 * bytes / weights, scales included.
        relative_error: squared error of the weights over their squared norm; 0 in 16 bit.
        output_error: mean over its experts of the squared error of the output on calibration tokens over the
            output's square, or None where it was not calibrated.
        rtn_output_error: the same with plain round to nearest.
    """

    layer: Count | None
    matrix: str
    scheme: str
    parameters: Count
    bits: Measure
    relative_error: Measure
    output_error: Measure | None
    rtn_output_error: Measure | None


def part_bytes(claims: Iterable[Claim], config: dict[str, Any]) -> tuple[PartBytes, ...]:
    """Bytes of all claimed tensors, by part and scheme; parts in the order of ``PARTS``, large ones first."""
    grouped: dict[tuple[str, str], list[Claim]] = defaultdict(list)
    for claim in claims:
        part = part_of(claim.tensor.name, claim.tensor.shape, claim.role, config)
        grouped[part, claim.stored.label if claim.stored else PLAIN].append(claim)
    rows = [
        PartBytes(
            part=part,
            scheme=scheme,
            tensors=len(members),
            source_bytes=sum(claim.bytes_16bit for claim in members),
            bytes=sum(claim.result_bytes for claim in members),
        )
        for (part, scheme), members in grouped.items()
    ]
    return tuple(sorted(rows, key=lambda row: (PARTS.index(row.part), -row.bytes, row.scheme)))


def part_of(name: str, shape: Sequence[int], role: Role, config: dict[str, Any]) -> str:
    """What a tensor is for, of ``PARTS``: by its role where that says it, else by the modules in its name."""
    if is_tower(name) or role.reason.startswith("tower"):
        return TOWERS
    if is_prediction(name, config):
        return PREDICTION
    if role.kind in _LOOKUPS:
        return _LOOKUPS[role.kind]
    modules = name.removesuffix(".weight").split(".")
    if len(shape) < 2 and ("norm" in modules[-1] or modules[-1].startswith("ln")):
        return "norms"
    if is_routed(name):
        return "routed experts"
    if "router" in modules or "gate" in modules[-2:] or modules[-1].endswith("expert_gate"):
        return "routers"
    named = (part for part, known in _MODULES.items() if not known.isdisjoint(modules))
    return next(named, "attention" if any("attn" in module for module in modules) else "other")


def layer_matrices(claims: Iterable[Claim], errors: Iterable[Mapping[str, Any]]) -> tuple[LayerMatrix, ...]:
    """Every matrix of every layer, experts together, in the order of the layers.

    Args:
        claims: of the plan.
        errors: ``stages.receipts.PartError`` of every stored matrix, as JSON.
    """
    found = {error["module"]: error for error in errors}
    grouped: dict[tuple[int | None, str], list[tuple[str, float, float, Mapping[str, Any]]]] = defaultdict(
        list
    )
    for claim in claims:
        weights = sum(part.out_features * part.in_features for part in claim.role.parts)
        for part in claim.role.parts:
            if claim.role.kind != "linear" and claim.stored is None:
                continue
            own = part.out_features * part.in_features
            scheme = claim.stored.label if claim.stored else PLAIN
            share = claim.result_bytes * own / weights
            grouped[place(part.module)].append((scheme, own, share, found.get(part.module, {})))
    made = [
        LayerMatrix(
            layer=layer,
            matrix=matrix,
            scheme=schemes.pop() if len(schemes := {scheme for scheme, *_ in members}) == 1 else "mixed",
            parameters=round(sum(own for _, own, _, _ in members)),
            bits=8 * sum(nbytes for _, _, nbytes, _ in members) / sum(own for _, own, _, _ in members),
            relative_error=_relative([error for *_, error in members]),
            output_error=_mean(error.get("output_error") for *_, error in members),
            rtn_output_error=_mean(error.get("rtn_output_error") for *_, error in members),
        )
        for (layer, matrix), members in grouped.items()
    ]
    return tuple(sorted(made, key=lambda row: (row.layer is None, row.layer or 0)))


def part_rows(parts: Sequence[PartBytes]) -> list[tuple[str, str, str, str, str, str]]:
    """(part, stored as, tensors, before, after, share of the result's bytes)."""
    total = sum(row.bytes for row in parts)
    return [
        (
            row.part,
            row.scheme,
            f"{row.tensors:,}",
            size(row.source_bytes),
            size(row.bytes),
            percent(row.bytes / total) if total else "-",
        )
        for row in parts
    ]


def error_range(values: Sequence[float]) -> str:
    """``0.0051 to 0.0091``: the least and the largest, of numbers."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    digits = 2 - math.floor(math.log10(top)) if 0 < (top := max(finite)) < 1 else 2
    return f"{number(min(finite), digits)} to {number(top, digits)}"


def place(module: str) -> tuple[int | None, str]:
    """Layer, and matrix without an expert's number.

    ``model.layers.3.mlp.experts.7.up_proj`` -> (3, ``mlp.experts.up_proj``).
    """
    layer = block_index(f"{module}.")
    words = module.split(".")
    inner = words[words.index(str(layer)) + 1 :] if layer is not None else words
    return layer, ".".join(word for word in inner if word and not word.isdigit())


def _relative(errors: Sequence[Mapping[str, Any]]) -> float:
    """Squared errors over squared norms, of matrices together."""
    norm = sum(error.get("squared_norm", 0.0) for error in errors)
    return float(sum(error.get("squared_error", 0.0) for error in errors) / norm) if norm else 0.0


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
