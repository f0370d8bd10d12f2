"""What calibration adds to a plan: which claims are walked, where the hidden states go, what it all costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from compressor.calibration.spec import CalibrationSpec
from compressor.device import (
    available_device_bytes,
    available_memory_bytes,
    has_accelerator,
    has_fast_bfloat16,
)
from compressor.errors import UserError
from compressor.model.families import block_index, text_config
from compressor.planner.oneshot import takes
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.solvers import parse_solver
from compressor.stages.base import Claim, needs_moments, needs_range
from compressor.stages.walk import WalkSpec
from compressor.workspace import stage_key

WALK_VERSION = 1
# Tokens of one forward pass: enough to keep matrix products busy, few enough for the activations.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# What hidden states, inputs and statistics may take of the memory that is free; blocks and solves need more.
_STATES_SHARE = 0.3
_INPUTS_SHARE = 0.2
_MOMENTS_SHARE = 0.2
_ASSUMED_HIDDEN = 8192
# Floating-point operations a second of two CPU cores, and of an accelerator, in a forward pass.
_FLOPS = {"cpu": 8e10, "cuda": 1e14}
# Copies of H, some of them in fp64, that solving takes (compressor/solvers/gptq.py).
_SOLVER_COPIES = 16
# Forward passes of a block: both streams up to each of four steps, and once through.
_PASSES = 6


@dataclass(frozen=True)
class WalkPlan:
    """The calibrated part of a plan.

    Attributes:
        calibration: on what.
        walk: how.
        device: ``cpu`` or ``cuda``; results differ in the last bits.
        blocks: bytes of each block's weights in the walk's dtype.
        states_bytes: both streams of hidden states.
        inputs_bytes: what one block's matrices are fed, at most.
        statistics_bytes: of moments and what a solver makes of the largest.
        walked_bytes: of the blocks' quantized tensors.
    """

    calibration: CalibrationSpec
    walk: WalkSpec
    device: Literal["cpu", "cuda"]
    blocks: tuple[int, ...]
    states_bytes: int
    inputs_bytes: int
    statistics_bytes: int
    walked_bytes: int

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with memory, disk and time of the walk."""
        # The block in both streams, and the one being read; the largest of each.
        held = 3 * max(self.blocks, default=0) + self.statistics_bytes
        held += self.states_bytes if self.walk.states == "host" else 0
        held += self.inputs_bytes if self.walk.keep_inputs else 0
        # States kept for a rerun replace the ones before only when they are whole.
        on_disk = self.states_bytes * (3 if self.walk.states == "disk" else 2)
        parameters = sum(self.blocks) / _DTYPE_BYTES[self.walk.dtype]
        forward_s = _PASSES * 2 * parameters * self.calibration.tokens / _FLOPS[self.device]
        return replace(
            prediction,
            peak_rss_bytes=max(prediction.peak_rss_bytes, BASE_RSS_BYTES + held),
            disk_bytes=prediction.disk_bytes + self.walked_bytes + on_disk,
            time_s=prediction.time_s + forward_s,
        )


def settle_solvers(claims: Sequence[Claim]) -> tuple[list[Claim], list[str]]:
    """The claims with rtn for those that lie in no block, where solvers get no data; and what to warn of."""
    outside = [
        claim
        for claim in claims
        if needs_moments(claim) and not takes(claim) and block_index(claim.tensor.name) is None
    ]
    if not outside:
        return list(claims), []
    names = {claim.tensor.name for claim in outside}
    rtn = parse_solver("rtn")
    settled = [replace(claim, solver=rtn) if claim.tensor.name in names else claim for claim in claims]
    some = ", ".join(sorted(names)[:3])
    return settled, [f"no block of the model holds {some}: solver rtn is used there, without calibration"]


def unmeasured(claims: Sequence[Claim]) -> list[UserError]:
    """A fault for every rule whose scheme needs the range of inputs of what lies in no block."""
    outside: dict[str, list[str]] = defaultdict(list)
    for claim in claims:
        if needs_range(claim) and not takes(claim) and block_index(claim.tensor.name) is None:
            outside[claim.rule].append(claim.tensor.name)
    return [
        UserError(
            f"the scheme stores a range of inputs, measured inside blocks only: {', '.join(names[:3])}",
            where=rule,
            fix="give these another scheme",
        )
        for rule, names in outside.items()
    ]


def plan_walk(claims: Sequence[Claim], calibration: CalibrationSpec, config: dict[str, Any]) -> WalkPlan:
    """Decides dtype, batches and places of a walk that some claim needs."""
    device: Literal["cpu", "cuda"] = "cuda" if has_accelerator() else "cpu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if has_fast_bfloat16() else "float32"
    width = _DTYPE_BYTES[dtype]
    blocks: dict[int, list[Claim]] = defaultdict(list)
    for claim in claims:
        index = block_index(claim.tensor.name)
        if index is not None:
            blocks[index].append(claim)
    hidden = text_config(config).get("hidden_size")
    streams = 2 if any(needs_moments(claim) for claim in claims) else 1
    states_bytes = streams * calibration.tokens * width * (hidden if type(hidden) is int else _ASSUMED_HIDDEN)
    widths = [_input_widths(members) for members in blocks.values()]
    inputs_bytes = calibration.tokens * width * max((sum(dense) for dense, _ in widths), default=0)
    free = available_memory_bytes()
    places: dict[Literal["device", "host"], float] = {
        "device": _STATES_SHARE * available_device_bytes() if device == "cuda" else 0,
        "host": _STATES_SHARE * free,
    }
    fitting: list[Literal["device", "host"]] = [
        place for place, room in places.items() if states_bytes < room
    ]
    spec = WalkSpec(
        batch_tokens=_BATCH_TOKENS[device],
        dtype=dtype,
        states=fitting[0] if fitting else "disk",
        moment_bytes=int(_MOMENTS_SHARE * (available_device_bytes() if device == "cuda" else free)),
        # An accelerator computes them again faster than they would be copied.
        keep_inputs=device == "cpu" and inputs_bytes < _INPUTS_SHARE * free,
    )
    walked = sum(
        claim.result_bytes for members in blocks.values() for claim in members if claim.scheme is not None
    )
    statistics = _statistics_bytes(widths, spec.moment_bytes)
    sizes = [width * sum(claim.tensor.numel for claim in members) for members in blocks.values()]
    return WalkPlan(calibration, spec, device, tuple(sizes), states_bytes, inputs_bytes, statistics, walked)


def _input_widths(claims: Sequence[Claim]) -> tuple[list[int], list[int]]:
    """Widths of the inputs of a block's matrices, and of its experts'; fused neighbours share one."""
    dense: dict[str, int] = {}
    routed: dict[str, int] = {}
    for claim in claims:
        for part in claim.role.parts if needs_moments(claim) else ():
            expert = part.expert is not None or ".experts." in part.module
            (routed if expert else dense)[part.fuse_group or part.module] = part.in_features
    return list(dense.values()), list(routed.values())


def _statistics_bytes(widths: Sequence[tuple[list[int], list[int]]], most: int) -> int:
    """One or two fp32 matrices an input, at most ``most`` bytes at once, and what a solver makes of one."""
    sums = [
        4 * (2 * sum(width**2 for width in dense) + sum(width**2 for width in routed))
        for dense, routed in widths
    ]
    largest = max((width for dense, routed in widths for width in (*dense, *routed)), default=0)
    return min(most, max(sums, default=0)) + _SOLVER_COPIES * 4 * largest**2


def walk_key(plan: WalkPlan, claims: Sequence[Claim], source: str) -> str:
    """Content key of the walk: the source, the tokens, the arithmetic, and every quantized claim."""
    spec = {
        "calibration": plan.calibration.content,
        "batch_tokens": plan.walk.batch_tokens,
        "dtype": plan.walk.dtype,
        "device": plan.device,
        "claims": [
            [
                claim.tensor.name,
                asdict(claim.role),
                claim.scheme.model_dump(mode="json"),
                claim.solver.model_dump(mode="json"),
            ]
            for claim in claims
            if claim.scheme is not None and claim.solver is not None
        ],
    }
    return stage_key("walk", WALK_VERSION, spec, [source])
