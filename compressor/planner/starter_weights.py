"""How a starter recipe stores the weights: what the GPU multiplies, as far as the model's shapes allow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressor.dialects import DIALECTS
from compressor.errors import PlanError, UserError
from compressor.model.families import family_for
from compressor.planner.calibrated import settle_solvers
from compressor.planner.claimed import solving_faults
from compressor.planner.claims import claim_tensors
from compressor.planner.starter_parts import LARGE_BYTES, Found, Section
from compressor.planner.walkable import walk_faults
from compressor.recipe.model import WeightsSection
from compressor.report.serve import family_notes
from compressor.stages.base import Claim, needs_data

_INT4_SIZES = (128, 64, 32)


def choose_weights(found: Found) -> Section:
    """The first scheme and solver that the model's shapes allow; ``found`` gets their claims.

    Raises:
        UserError: none fits.
    """
    refused: list[str] = []
    for scheme, solver, reason in _candidates(found):
        section = WeightsSection.model_validate({"scheme": scheme, "solver": solver})
        problem = _try(found, section)
        if problem is None:
            value = {"scheme": scheme, "solver": solver}
            model_type = str(found.source.config.get("model_type"))
            labels = dict.fromkeys(claim.stored.label for claim in found.claims if claim.stored)
            known = [note for label in labels for note in family_notes(label, model_type)]
            return Section("weights", value, (reason, *known, *_left(found.claims), *refused[:2]))
        # Names of matrices stand in brackets behind it.
        refused.append(f"{_spelt(scheme)} with {solver} was not possible: {problem.partition(' (')[0]}")
    raise UserError(
        f"nothing in {found.source.label} can be stored in fewer bits: {refused[-1]}",
        fix="look at it with `compress inspect`",
    )


def _try(found: Found, section: WeightsSection) -> str | None:
    """Why the section does not go with the model; None after keeping its claims."""
    config, dialect = found.source.config, DIALECTS["compressed-tensors"]
    try:
        claims = claim_tensors(
            found.source.headers, config, family_for(config), section, dialect, {}, may_copy_all=False
        )
    except PlanError as error:
        return error.faults[0].what
    except UserError as error:
        return error.what
    claims, _ = settle_solvers(claims)
    faults = solving_faults(claims, found.source, dialect, polished=False)
    if not faults and any(needs_data(claim) for claim in claims):
        faults = walk_faults(claims, config, found.source.label)
    if faults:
        return faults[0].what
    found.claims = list(claims)
    return None


def _candidates(found: Found) -> list[tuple[Any, str, str]]:
    """Schemes by preference, with solver and reason; the last ones fit every shape."""
    gpu, goal = found.gpu, found.goal
    native = gpu.flops.keys()
    large = sum(header.numel for header in found.source.headers.values()) * 2 > LARGE_BYTES
    solver = "rtn" if large else "gptq"
    how = (
        "`gptq` loses less and passes the whole model over the calibration texts; at this size it takes long."
        if large
        else "`gptq` chooses values by the calibration texts; `rtn` needs none and is done in minutes."
    )
    eight = ("fp8_dynamic", "rtn", f"8 bits: FP8, which {gpu.name} multiplies; no texts are needed.")
    if "fp8" not in native:
        eight = (
            "int8",
            "rtn",
            f"8 bits: {gpu.name} has no FP8, so integers, decoded to bf16 as they are read.",
        )
    fallback = [eight, ("fp8_dynamic", "rtn", "8 bits: FP8 with a scale for each row fits every shape.")]
    if goal == "quality":
        return fallback
    ints = [
        (
            {"kind": "int4", "group_size": size},
            solver,
            f"4-bit integers in groups of {size}, decoded to 16 bit as they are read: the smallest weights "
            f"that {gpu.name} reads fast, for it has no 4-bit arithmetic. {how}",
        )
        for size in _INT4_SIZES
    ]
    if "fp4" in native:
        four = f"NVFP4 weights and activations: {gpu.name} multiplies 4-bit floats. {how}"
        without = f"NVFP4 weights, 16-bit activations. {how}"
        return [
            ("nvfp4", solver, four),
            ("nvfp4a16", solver, without),
            ("nvfp4a16", "rtn", without),
            *fallback,
        ]
    if goal == "speed":
        if "fp8" not in native and "int8" in native:
            what = f"8-bit integers, activations too: {gpu.name} multiplies them, and has no FP8."
            return [({"kind": "int8", "activations": "dynamic"}, "rtn", what), *fallback]
        return fallback
    by_rtn = [(scheme, "rtn", reason) for scheme, _, reason in ints]
    return [*ints, *by_rtn, *fallback]


def _spelt(scheme: Any) -> str:
    if isinstance(scheme, dict):
        return " ".join(str(value) for value in scheme.values())
    return str(scheme)


def _left(claims: Sequence[Claim]) -> tuple[str, ...]:
    """What stays in 16 bit by default, largest first."""
    sizes: dict[str, int] = {}
    for claim in claims:
        if claim.stored is None and claim.role.reason and len(claim.tensor.shape) > 1:
            sizes[claim.role.reason] = sizes.get(claim.role.reason, 0) + claim.result_bytes
    if not sizes:
        return ()
    named = sorted(sizes, key=lambda reason: -sizes[reason])[:6]
    return (f"These stay in 16 bit unless a rule says otherwise: {'; '.join(named)}.",)
