"""What is wrong with the positions of a config.json as it is found. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.errors import CheckpointError
from compressor.rope.positions import Positions, is_number, read_positions, shown
from compressor.rope.refusals import SWITCHING, yarn_is_misread

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# Read by vLLM 0.32 as numbers wherever they are there: an explicit null fails.
_NEVER_NULL = ("factor", "beta_fast", "beta_slow")
_NUMBERS = (
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    *("low_freq_factor", "high_freq_factor", "short_mscale", "long_mscale"),
)
_TYPES = frozenset({*_NEEDED, "default", "proportional"})
_NEAR = 1e-3  # share by which a factor may miss the quotient of lengths: a rounded one


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: ``error`` where an engine fails or reads other positions than the config means, else
            ``warning``.
        what: one sentence.
    """

    severity: Literal["error", "warning"]
    what: str


def check_positions(config: Mapping[str, Any]) -> tuple[Finding, ...]:
    """What transformers 5.17 or vLLM 0.32 would get wrong; none for models without rotary positions.

    transformers only warns of most of these, and of some not at all.

    Args:
        config: contents of a config.json.
    """
    try:
        positions = read_positions(config)
    except CheckpointError as error:
        # A model without rotary positions is no fault, one whose fields cannot be read is.
        without = error.what.startswith("no rope_theta")
        return () if without and not _has_scaling(config) else (Finding("error", error.what),)
    if positions.rope_type == "default":
        return tuple(_both_sections(positions))
    return (*_both_sections(positions), *_scaling(positions))


def _has_scaling(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("rope_scaling", "rope_parameters"))


def _both_sections(positions: Positions) -> Iterator[Finding]:
    """The legacy section beside the new one."""
    legacy, written = positions.text.get("rope_scaling"), positions.text.get("rope_parameters")
    if not legacy or not written:
        return
    if dict(legacy) != dict(written):
        yield Finding(
            "error",
            "has rope_scaling and other rope_parameters: transformers takes the first, which is legacy",
        )


def _scaling(positions: Positions) -> Iterator[Finding]:
    """Of the fields of a scaling."""
    told, kind = positions.parameters, positions.rope_type
    if kind not in _TYPES:
        yield Finding("error", f"rope_type {shown(kind)} is none that engines know")
        return
    legacy = positions.text.get("rope_scaling") or positions.text.get("rope_parameters") or {}
    if {"type", "rope_type"} <= legacy.keys() and legacy["type"] not in (legacy["rope_type"], "su", "mrope"):
        yield Finding(
            "error", f"type {shown(legacy['type'])} contradicts rope_type {shown(kind)}: vLLM refuses"
        )
    for key in _NEVER_NULL:
        if key in told and told[key] is None:
            yield Finding("error", f"{key} is null: vLLM fails, leave it out")
    for key in _NUMBERS:
        if told.get(key) is not None and not is_number(told[key]):
            yield Finding("error", f"{key} is {shown(told[key])}, not a number")
    if not isinstance(told.get("truncate", True), bool):
        yield Finding("error", f"truncate is {shown(told['truncate'])}, neither true nor false")
    for key in _NEEDED.get(kind, ()):
        if told.get(key) is None and not (key.startswith("original") and positions.original_length):
            yield _missing(kind, key)
    factor = told.get("factor")
    if factor is not None:
        yield from _factor(positions, factor)
    if kind == "longrope":
        yield from _longrope(positions)
    if kind == "yarn" and yarn_is_misread(positions):
        yield Finding(
            "error", "yarn with mrope_section: vLLM takes four times the original length for its blend"
        )
    if kind == "llama3":
        yield from _llama3(positions)
    if kind == "dynamic":
        yield Finding("error", "dynamic scaling: vLLM does not change frequencies with the text")


def _missing(kind: str, key: str) -> Finding:
    if key == "original_max_position_embeddings":
        return Finding(
            "error",
            f"{kind} without {key}: transformers silently takes max_position_embeddings for it, vLLM fails",
        )
    return Finding("error", f"{kind} without {key}")


def _factor(positions: Positions, factor: object) -> Iterator[Finding]:
    """Of ``factor``, by itself and against the lengths."""
    kind, now, original = positions.rope_type, positions.length, positions.original_length
    if not is_number(factor) or factor < 1:
        yield Finding("error", f"factor is {shown(factor)}, not a number of at least 1")
        return
    if isinstance(factor, int) and kind == "linear":
        yield Finding("error", f"factor is the integer {factor}: vLLM fails, write {float(factor)}")
    if now is None or original is None or kind not in ("yarn", "longrope"):
        return
    reached = original * float(factor)
    if kind == "yarn" and now > reached * (1 + _NEAR):
        yield Finding(
            "error",
            f"max_position_embeddings is {now}, but factor {factor:g} of {original} reaches {reached:g}: "
            "vLLM has no positions beyond",
        )
    elif abs(now - reached) > reached * _NEAR:
        yield Finding(
            "warning",
            f"factor {factor:g} of {original} is not max_position_embeddings, {now}"
            + (": vLLM reads the latter" if kind == "longrope" else ""),
        )


def _longrope(positions: Positions) -> Iterator[Finding]:
    """Of the lists of factors."""
    told, wanted = positions.parameters, positions.rotary_dim // 2
    for key in ("short_factor", "long_factor"):
        found = told.get(key)
        if found is None:
            continue
        if not isinstance(found, list) or not all(is_number(by) and by > 0 for by in found):
            yield Finding("error", f"{key} is no list of positive numbers")
        elif len(found) == 1 != wanted:
            yield Finding("error", f"{key} has one factor: engines use it for all {wanted} frequencies")
        elif len(found) != wanted:
            yield Finding("error", f"{key} has {len(found)} factors, the model {wanted} frequencies")
    if told.get("short_factor") != told.get("long_factor") and positions.model_type not in SWITCHING:
        yield Finding(
            "warning",
            "short_factor and long_factor differ: where a text grows past the original length, transformers "
            f"keeps keys of the short ones in the cache (model_type {positions.model_type!r})",
        )
    if positions.kind is not None:
        yield Finding(
            "error",
            "longrope for one kind of layers: transformers fails at the second text past the original length",
        )


def _llama3(positions: Positions) -> Iterator[Finding]:
    """Of the blend, and of the lengths."""
    low = positions.parameters.get("low_freq_factor")
    high = positions.parameters.get("high_freq_factor")
    if is_number(low) and is_number(high) and high <= low:
        yield Finding("error", f"high_freq_factor {high} is not above low_freq_factor {low}")
    now, original = positions.length, positions.original_length
    if now is not None and original is not None and original >= now:
        yield Finding(
            "warning",
            f"original_max_position_embeddings is {original}, not below max_position_embeddings {now}",
        )
