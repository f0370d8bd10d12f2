"""What solver ``llmcompressor`` adds to a plan: whether its stage can take the claims, and what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.errors import UserError
from compressor.model.families import block_index, is_prediction, tied
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.planner.sizes import (
    Device,
    active_parameters,
    hidden_size,
    planned_device,
    quantized_content,
)
from compressor.solvers.llmcompressor import LIBRARY, LlmCompressor
from compressor.stages.base import Claim
from compressor.workspace import stage_key

ONESHOT_VERSION = 1
# What decides the values, beside the claims.
_PACKAGES = (LIBRARY, "compressed-tensors", "auto-round")
# The library and what it imports, beside what every run imports: 1.50 GB were measured at the most for
# SmolLM2-135M-Instruct, whose weights in fp32 have 0.54.
_LIBRARY_BYTES = 300_000_000
# Forward passes of the model for each modifier, one sequence at a time: one is heard, one passes errors on.
_PASSES = 2
_FLOPS = {"cpu": 4e10, "cuda": 2e13}


@dataclass(frozen=True)
class OneshotPlan:
    """The part of a plan that llm-compressor does.

    Attributes:
        calibration: on what.
        device: ``cpu`` or ``cuda``; results differ in the last bits.
        load_bytes: the model as it is loaded, in fp32.
        held_bytes: while the library works: the model in 16 bit, copies of weights, states, statistics.
        stored_bytes: of the quantized tensors, and of those that transforms may change.
        forward_s: of all forward passes.
    """

    calibration: CalibrationSpec
    device: Device
    load_bytes: int
    held_bytes: int
    stored_bytes: int
    forward_s: float

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with memory, disk and time of the stage; the solver's rate is in it already."""
        held = BASE_RSS_BYTES + _LIBRARY_BYTES + max(self.load_bytes, self.held_bytes)
        return replace(
            prediction,
            peak_rss_bytes=max(prediction.peak_rss_bytes, held),
            disk_bytes=prediction.disk_bytes + self.stored_bytes,
            time_s=prediction.time_s + self.forward_s,
        )


def takes(claim: Claim) -> bool:
    """Whether llm-compressor chooses the claim's values."""
    return isinstance(claim.solver, LlmCompressor)


def oneshot_solver(claims: Sequence[Claim]) -> LlmCompressor | None:
    """The solver of a recipe that uses llm-compressor, else None."""
    return next((claim.solver for claim in claims if isinstance(claim.solver, LlmCompressor)), None)


def oneshot_faults(claims: Sequence[Claim], source: Source, *, polished: bool) -> list[UserError]:
    """What of a recipe that uses llm-compressor cannot be done; empty for other recipes.

    ``polished``: whether the recipe asks for a polish.
    """
    solver = oneshot_solver(claims)
    if solver is None:
        return []
    faults = []
    first = next(claim for claim in claims if takes(claim))
    others = {claim.rule: claim for claim in claims if claim.scheme is not None and claim.solver != solver}
    for rule, claim in others.items():
        assert claim.solver is not None
        apart = "with other modifiers" if takes(claim) else f"and solver {claim.solver.kind}"
        faults.append(
            UserError(
                f"solver llmcompressor works on the whole model at once, {first.rule} uses it {apart} here",
                where=rule,
                fix="give every quantized tensor the same solver with the same modifiers",
            )
        )
    embeddings = {claim.rule for claim in claims if takes(claim) and claim.role.kind == "embedding"}
    faults += [
        UserError(
            "solver llmcompressor does not quantize embeddings here", where=rule, fix="leave them in 16 bit"
        )
        for rule in embeddings
    ]
    if polished:
        faults.append(
            UserError(
                "polish goes on where the walk ends, and solver llmcompressor works without one",
                where="weights.polish",
                fix="leave polish out, or use one of this tool's solvers",
            )
        )
    if solver.uses("SpinQuantModifier") and tied(source.config, source.headers):
        faults.append(
            UserError(
                "SpinQuantModifier changes the embedding and the head differently, and this model has one "
                "tensor for both",
                where=first.rule,
                fix="use AWQModifier or SmoothQuantModifier",
            )
        )
    predicting = any(is_prediction(name, source.config) for name in source.headers)
    if solver.uses("SpinQuantModifier") and predicting:
        faults.append(
            UserError(
                "SpinQuantModifier rotates the hidden states that the model's prediction layer reads, and "
                "the layer stays as it is: it would foretell nothing",
                where=first.rule,
                fix="use AWQModifier or SmoothQuantModifier",
            )
        )
    if find_spec(LIBRARY) is None:
        faults.append(
            UserError(
                "solver llmcompressor needs the package llmcompressor, which is not installed",
                where=first.rule,
                fix="pip install 'compressor[llmcompressor]'",
            )
        )
    return faults


def plan_oneshot(
    claims: Sequence[Claim], calibration: CalibrationSpec, config: dict[str, Any]
) -> OneshotPlan | None:
    """The costs of the stage, or None for a recipe that does not use llm-compressor.

    The whole model is loaded in fp32 and then held in 16 bit. A recipe with transforms and a quantizer that
    rounds in place holds the weights as they were between the two as well. Hidden states are in host memory,
    twice, wherever the model computes; a Hessian is fp32 [in, in] for each matrix of a block.
    """
    solver = oneshot_solver(claims)
    if solver is None:
        return None
    parameters = sum(claim.tensor.numel for claim in claims)
    quantized = [claim for claim in claims if claim.scheme is not None]
    device = planned_device()
    held = 2 * parameters + 2 * calibration.tokens * hidden_size(config) * 2
    if solver.transforms and solver.overwrites:
        held += 2 * sum(claim.tensor.numel for claim in quantized)
    if device == "cpu" and solver.uses("GPTQModifier"):
        hessians: dict[int | None, int] = defaultdict(int)
        for claim in quantized:
            hessians[block_index(claim.tensor.name)] += sum(
                4 * part.in_features**2 for part in claim.role.parts
            )
        held += max(hessians.values())
    stored = sum(claim.result_bytes for claim in quantized)
    if solver.transforms:
        stored += sum(claim.result_bytes for claim in claims if claim.scheme is None)
    work = 2 * active_parameters(claims, config) * calibration.tokens
    forward_s = len(solver.named) * _PASSES * work / _FLOPS[device]
    return OneshotPlan(calibration, device, 4 * parameters, held, stored, forward_s)


def oneshot_key(plan: OneshotPlan, claims: Sequence[Claim], source: str) -> str:
    """Content key of the stage: source, tokens, every quantized claim, and the libraries' versions."""
    spec = {
        "calibration": plan.calibration.content,
        "device": plan.device,
        "versions": {package: _version(package) for package in _PACKAGES},
        "claims": quantized_content(claims),
    }
    return stage_key("oneshot", ONESHOT_VERSION, spec, [source])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
