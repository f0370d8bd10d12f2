"""From which length a model is scaled, by how much, and how far that reaches; this imports no torch."""

from __future__ import annotations

import math

from compressor.errors import UserError
from compressor.model.reach import reach
from compressor.rope.positions import LONGEST, Positions, is_int, is_number, shown
from compressor.rope.spec import ContextSpec

MOST_FACTOR = 10_000.0
_ROUNDING = 1e-4  # tokens: what a quotient of lengths times its divisor may fall short


def original_length(positions: Positions, spec: ContextSpec) -> tuple[int, list[str]]:
    """L, and notes on how it was found.

    Raises:
        UserError: it is not known, or the model is scaled already in a way that leaves no way on.
    """
    now = positions.length
    if positions.rope_type != "default":
        return _scaled_already(positions, spec), [
            f"the source is scaled by {positions.rope_type} already: the factor counts from "
            f"{positions.original_length} tokens, and takes the place of its own"
        ]
    found = spec.original_length or now
    if found is None:
        raise UserError(
            "config.json has no max_position_embeddings: the length of the training is not known",
            where="context.original_length",
            fix="name it",
        )
    if not is_int(found, 2, LONGEST):
        raise UserError(f"is {shown(found)}, not a number of tokens", where="context.original_length")
    if now is not None and found > now:
        raise UserError(
            f"{found} is more than max_position_embeddings of the source, {now}",
            where="context.original_length",
            fix=f"name at most {now}",
        )
    return found, []


def _scaled_already(positions: Positions, spec: ContextSpec) -> int:
    """L of a model that is scaled already, if the same scaling can be made longer.

    Raises:
        UserError: it cannot, or reads that far already.
    """
    kind, now, original = positions.rope_type, reach(positions.text), positions.original_length
    if now is not None and spec.target_length <= now:
        raise UserError(
            f"the source reads {now} tokens already: it is scaled by {kind}",
            where="context.target_length",
            fix="leave the section context out",
        )
    if original is None:
        raise UserError(
            f"the source is scaled by {kind} already, and its config does not say from which length",
            where="context.target_length",
            fix="start from the model before it was scaled",
        )
    if spec.method != kind or kind == "longrope":
        raise UserError(
            f"the source is scaled by {kind} already, and was trained so: its frequencies are no longer "
            f"those that {spec.method} counts from",
            where="context.method",
            fix="start from the model before it was scaled"
            + ("" if kind == "longrope" else f", or make its own longer: method {kind}"),
        )
    if positions.parameters.get("attention_factor") is not None:
        raise UserError(
            f"the source is scaled by {kind} already, with an attention_factor of its own for that length",
            where="context.method",
            fix="start from the model before it was scaled",
        )
    if spec.original_length not in (None, original):
        raise UserError(
            f"{spec.original_length} is not what the source is scaled from: {original}",
            where="context.original_length",
            fix="leave it out",
        )
    return original


def settled_reach(spec: ContextSpec, original: int) -> tuple[float, int]:
    """The factor, and the tokens that are read by it.

    Raises:
        UserError: the target is not beyond the original length, or the factor does not lead there.
    """
    target = spec.target_length
    if not is_int(target, 2, LONGEST):
        raise UserError(f"is {shown(target)}, not a number of tokens", where="context.target_length")
    if target <= original:
        raise UserError(
            f"{target} tokens are not more than the original length, {original}",
            where="context.target_length",
            fix="leave the section context out, or name a longer one",
        )
    given = spec.factor
    smallest = target / original
    if smallest > MOST_FACTOR:
        raise UserError(f"is {smallest:g} times the original length", where="context.target_length")
    if given is None:
        return _factor(spec, original, target), target
    if not is_number(given) or not 1 < given <= MOST_FACTOR:
        raise UserError(
            f"is {shown(given)}, not a number above 1 and at most {MOST_FACTOR:g}", where="context.factor"
        )
    length = math.floor(original * float(given) + _ROUNDING)
    if spec.method == "llama3":
        return float(given), max(length, target)
    if length < target:
        raise UserError(
            f"{given:g} times {original} tokens are {length}, less than target_length {target}",
            where="context.factor",
            fix=f"leave it out, or name at least {smallest:g}",
        )
    return _factor(spec, original, length), length


def _factor(spec: ContextSpec, original: int, length: int) -> float:
    """``length / original``, as engines turn it into a length again.

    transformers compares YaRN's with the quotient of both lengths; vLLM rounds the product of linear's down.
    """
    factor = length / original
    if spec.method in ("linear", "dynamic"):
        while int(original * factor) < length:
            factor = math.nextafter(factor, math.inf)
    return factor
