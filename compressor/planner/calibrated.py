"""What calibration adds to a plan: which claims are walked, where the hidden states go, what it all costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.made_by import FACTORY_KEY
from compressor.device import available_device_bytes, available_memory_bytes, has_fast_bfloat16
from compressor.errors import UserError
from compressor.model.families import block_index
from compressor.planner.memory import activation_bytes, hold_blocks
from compressor.planner.oneshot import takes
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.planner.sizes import (
    BATCH_TOKENS,
    DTYPE_BYTES,
    Device,
    active_parameters,
    hidden_size,
    in_block,
    is_routed,
    planned_device,
    quantized_content,
    routed_share,
)
from compressor.planner.smoothed import smoothed_bytes
from compressor.planner.walkable import decoder_blocks
from compressor.solvers import parse_solver
from compressor.solvers.base import LEARNED_BYTES
from compressor.stages.base import Claim, needs_calibration, needs_moments, needs_range
from compressor.stages.walk import WalkSpec
from compressor.workspace import stage_key

WALK_VERSION = 4
# What hidden states, inputs and statistics may take of the memory that is free; blocks and solves need more.
_STATES_SHARE = 0.3
_INPUTS_SHARE = 0.2
_MOMENTS_SHARE = 0.2
# Of what is learned of a block; what a pass leaves for the way back needs as much again.
_LEARN_SHARE = 0.4
# The same in bytes on an accelerator, where they wait in the host's memory or are computed again for little;
# and the tokens and the largest activation of one pass.
_DEVICE_STATES_BYTES = 1 << 30
_DEVICE_MOMENT_BYTES = 9 << 28
_DEVICE_BATCH_TOKENS = 1 << 16
_DEVICE_ACTIVATION_BYTES = 1 << 27
# The same of experts' inputs, of which few are held at once, and which are many small products otherwise.
_DEVICE_ROUTED_BYTES = 1 << 29
# Floating-point operations a second. CPU: two cores of an EPYC with AVX512-BF16 in walks of
# SmolLM2-135M-Instruct with 4,096 and 16,384 tokens; without that extension they compute in float32.
# Accelerators: a tenth of an H100's peak, not measured.
_FORWARD_FLOPS = {
    ("cpu", "float32"): 1.1e11,
    ("cpu", "bfloat16"): 2.4e11,
    ("cuda", "float32"): 6e12,
    ("cuda", "bfloat16"): 1e14,
}
# Moments are sums of products in fp32.
_MOMENT_FLOPS = {"cpu": 1.7e11, "cuda": 6e12}
# Copies of H, some of them in fp64, that solving takes (compressor/solvers/gptq.py).
_SOLVER_COPIES = 16
# Passes of a block in which a stream is heard: it starts anew for each of four steps and ends there.
_HEARING = 2
# Hidden states that a batch leaves behind for the way back through a block; a training step costs as much as
# so many forward passes (compressor/stages/learn.py).
_LEARNED_STATES = 40
_TRAINING_PASSES = 3
# Blocks that a warning names.
_SHOWN = 8


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
        statistics_bytes: of moments and what a solver makes of the largest, or of learning or smoothing a
            block.
        walked_bytes: of the blocks' quantized tensors.
        held_bytes: of the blocks that are held at once, with the activations of a pass.
        entry_bytes: what it takes to compute the first block's inputs: the embedding, as it is read too.
        time_s: of forward passes and moments; solving is in the prediction already.
    """

    calibration: CalibrationSpec
    walk: WalkSpec
    device: Device
    blocks: tuple[int, ...]
    states_bytes: int
    inputs_bytes: int
    statistics_bytes: int
    walked_bytes: int
    held_bytes: int
    entry_bytes: int
    time_s: float

    def warnings(self) -> list[str]:
        """What the user should know before starting: blocks that will not be learned."""
        if not self.walk.unlearned:
            return []
        some = ", ".join(map(str, self.walk.unlearned[:_SHOWN]))
        more = len(self.walk.unlearned) - _SHOWN
        some += f" and {more} more" if more > 0 else ""
        return [
            f"too little memory is free to learn blocks {some}: they stay as the start solver makes them; "
            "with more free memory the result is another"
        ]

    @property
    def kept_bytes(self) -> int:
        """What lies on the disk only until the walk is done: states that are spilled, or kept for a rerun."""
        # Those kept replace the ones before only when they are whole.
        return self.states_bytes * (3 if self.walk.states == "disk" else 2)

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with memory, disk and time of the walk."""
        states = self.states_bytes if self.walk.states == "host" else 0
        held = self.held_bytes + self.statistics_bytes
        held += self.inputs_bytes if self.walk.keep_inputs else 0
        held = states + max(held, self.entry_bytes)
        return replace(
            prediction,
            peak_rss_bytes=max(prediction.peak_rss_bytes, BASE_RSS_BYTES + held),
            disk_bytes=prediction.disk_bytes + self.walked_bytes + self.kept_bytes,
            time_s=prediction.time_s + self.time_s,
        )


def settle_solvers(claims: Sequence[Claim]) -> tuple[list[Claim], list[str]]:
    """The claims with rtn for those that lie in no block, where solvers get no data; and what to warn of."""
    outside = [
        claim for claim in claims if needs_calibration(claim) and not takes(claim) and not in_block(claim)
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
        if needs_range(claim) and not takes(claim) and not in_block(claim):
            outside[claim.rule].append(claim.tensor.name)
    return [
        UserError(
            f"the scheme stores a range of inputs, measured inside blocks only: {', '.join(names[:3])}",
            where=rule,
            fix="give these another scheme",
        )
        for rule, names in outside.items()
    ]


def plan_walk(
    claims: Sequence[Claim],
    calibration: CalibrationSpec,
    config: dict[str, Any],
    most_memory_bytes: int | None = None,
) -> WalkPlan:
    """Decides dtype, batches and places of a walk that some claim needs.

    ``most_memory_bytes``: of the process, where it may not take all that is free.
    """
    device = planned_device()
    # Modules of strangers mix parameters with buffers, which stay in float32.
    fast = has_fast_bfloat16() and FACTORY_KEY not in config
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if fast else "float32"
    width = DTYPE_BYTES[dtype]
    blocks: dict[int, list[Claim]] = defaultdict(list)
    for claim in claims:
        index = block_index(claim.tensor.name)
        if index is not None:
            blocks[index].append(claim)
    streams = 2 if any(needs_calibration(claim) for claim in claims) else 1
    states_bytes = streams * calibration.tokens * width * hidden_size(config)
    widths = [_input_widths(members) for members in blocks.values()]
    inputs_bytes = calibration.tokens * width * max((sum(dense) for dense, _ in widths), default=0)
    free = available_memory_bytes()
    if most_memory_bytes is not None:
        free = max(0, min(free, most_memory_bytes - BASE_RSS_BYTES))
    places: dict[Literal["device", "host"], float] = {
        "device": min(_STATES_SHARE * available_device_bytes(), _DEVICE_STATES_BYTES)
        if device == "cuda"
        else 0,
        "host": _STATES_SHARE * free,
    }
    fitting: list[Literal["device", "host"]] = [
        place for place, room in places.items() if states_bytes < room
    ]
    spec = WalkSpec(
        batch_tokens=_batch_tokens(widths, device, width, config),
        dtype=dtype,
        states=fitting[0] if fitting else "disk",
        moment_bytes=min(int(_MOMENTS_SHARE * available_device_bytes()), _DEVICE_MOMENT_BYTES)
        if device == "cuda"
        else int(_MOMENTS_SHARE * free),
        # An accelerator computes them again faster than they would be copied.
        keep_inputs=device == "cpu" and inputs_bytes < _INPUTS_SHARE * free,
        unlearned=_unlearned(blocks, _LEARN_SHARE * (available_device_bytes() if device == "cuda" else free)),
    )
    walked = sum(
        claim.result_bytes for members in blocks.values() for claim in members if claim.scheme is not None
    )
    smoothed = [smoothed_bytes(members, spec, calibration.tokens) for members in blocks.values()]
    statistics = max(
        _statistics_bytes(widths, spec.moment_bytes),
        _learned_bytes(blocks, spec, hidden_size(config)),
        max((choosing for choosing, _ in smoothed), default=0),
    ) + max((held for _, held in smoothed), default=0)
    decoder = decoder_blocks(claims)
    beside = statistics + (states_bytes if spec.states == "host" else 0)
    beside += inputs_bytes if spec.keep_inputs else 0
    spec, held = _held(decoder, spec, device, calibration, config, streams=streams, free=free - beside)
    sizes = [width * sum(claim.tensor.numel for claim in members) for members in blocks.values()]
    entry = sum(
        claim.tensor.nbytes + width * claim.tensor.numel for claim in claims if claim.role.kind == "embedding"
    )
    time_s = _time_s([c for c in claims if in_block(c)], widths, calibration.tokens, spec, device, config)
    return WalkPlan(
        calibration=calibration,
        walk=spec,
        device=device,
        blocks=tuple(sizes),
        states_bytes=states_bytes,
        inputs_bytes=inputs_bytes,
        statistics_bytes=statistics,
        walked_bytes=walked,
        held_bytes=held,
        entry_bytes=entry,
        time_s=time_s,
    )


def _held(
    blocks: Mapping[int, Sequence[Claim]],
    spec: WalkSpec,
    device: Device,
    calibration: CalibrationSpec,
    config: dict[str, Any],
    *,
    streams: int,
    free: float,
) -> tuple[WalkSpec, int]:
    """The spec with how the blocks are held, and the bytes of these and of a pass's activations."""
    width, first = DTYPE_BYTES[spec.dtype], next(iter(blocks.values()), [])
    tokens = min(calibration.tokens, max(spec.batch_tokens, calibration.sequence_length))
    made = {stored: activation_bytes(first, tokens, width, config, stored=stored) for stored in (False, True)}
    if device != "cpu":
        # Blocks wait in the host's memory, where next to nothing else is.
        whole = max(
            (width * sum(claim.tensor.numel for claim in members) for members in blocks.values()), default=0
        )
        return spec, 3 * whole
    held = hold_blocks(blocks, width, streams=streams, free_bytes=free - made[False])
    chosen = replace(spec, read_ahead=held.read_ahead, stored_experts=held.stored_experts)
    return chosen, held.nbytes + made[held.stored_experts]


def _batch_tokens(
    widths: Sequence[tuple[list[int], list[int]]], device: Device, item_bytes: int, config: dict[str, Any]
) -> int:
    """Tokens of one pass: on an accelerator fewer where they would take much of its memory."""
    if device == "cpu":
        return BATCH_TOKENS[device]
    most = float(_DEVICE_BATCH_TOKENS)
    for dense, routed in widths:
        of_experts = sum(width for width in routed if width == max(routed)) * routed_share(config)
        most = min(most, _DEVICE_ACTIVATION_BYTES / (max((1, *dense)) * item_bytes))
        most = min(most, _DEVICE_ROUTED_BYTES / (max(1.0, of_experts) * item_bytes))
    return int(most)


def _time_s(
    claims: Sequence[Claim],
    widths: Sequence[tuple[list[int], list[int]]],
    tokens: int,
    spec: WalkSpec,
    device: Device,
    config: dict[str, Any],
) -> float:
    """Seconds of the passes through all blocks, of the moments of what is heard, and of learning.

    The source's stream passes once; where its inputs are not kept it starts anew for every step, and passes
    the block in the last one. The result's is heard at every step and then passes. Its second and its cross
    moment are a product each, of experts only the former. ``claims`` are those in blocks, ``widths`` of each
    block.
    """
    passes = 1 + any(needs_calibration(claim) for claim in claims)
    if any(needs_moments(claim) for claim in claims):
        passes += _HEARING if spec.keep_inputs else 2 * _HEARING - 1
    batches = max(1, tokens // spec.batch_tokens)
    learned = _TRAINING_PASSES * max(map(_learning_steps, claims), default=0) / batches
    forward = (passes + learned) * 2 * active_parameters(claims, config)
    moments = 0.0
    for dense, routed in widths:
        moments += 2 * 2 * sum(width**2 for width in dense)
        moments += 2 * sum(width**2 for width in routed) * routed_share(config)
    return tokens * (forward / _FORWARD_FLOPS[device, spec.dtype] + moments / _MOMENT_FLOPS[device])


def _input_widths(claims: Sequence[Claim]) -> tuple[list[int], list[int]]:
    """Widths of the inputs of a block's matrices, and of its experts'; fused neighbours share one."""
    dense: dict[str, int] = {}
    routed: dict[str, int] = {}
    for claim in claims:
        for part in claim.role.parts if needs_moments(claim) else ():
            (routed if is_routed(part.module) else dense)[part.fuse_group or part.module] = part.in_features
    return list(dense.values()), list(routed.values())


def _statistics_bytes(widths: Sequence[tuple[list[int], list[int]]], most: int) -> int:
    """Two fp32 matrices an input, or one and what an expert may be topped up with, at most ``most`` bytes at
    once; and what a solver makes of one.
    """
    sums = [
        8 * sum(width**2 for width in dense) + 5 * sum(width**2 for width in routed)
        for dense, routed in widths
    ]
    largest = max((width for dense, routed in widths for width in (*dense, *routed)), default=0)
    return min(most, max(sums, default=0)) + _SOLVER_COPIES * 4 * largest**2


def _unlearned(blocks: Mapping[int, Sequence[Claim]], most_bytes: float) -> tuple[int, ...]:
    """The blocks that take more than that to be learned, beside both streams' and a batch's states."""
    return tuple(sorted(index for index, claims in blocks.items() if _learning_bytes(claims) > most_bytes))


def _learning_bytes(claims: Sequence[Claim]) -> int:
    return LEARNED_BYTES * sum(claim.tensor.numel for claim in claims if _learning_steps(claim))


def _learned_bytes(blocks: Mapping[int, Sequence[Claim]], spec: WalkSpec, hidden: int) -> int:
    """What learning the largest block takes that is learned, with a batch's states."""
    sizes = [_learning_bytes(claims) for index, claims in blocks.items() if index not in spec.unlearned]
    states = DTYPE_BYTES[spec.dtype] * spec.batch_tokens * hidden * _LEARNED_STATES
    return max(sizes) + states if any(sizes) else 0


def _learning_steps(claim: Claim) -> int:
    learned = claim.solver.learning if claim.solver is not None else None
    return learned.steps if learned is not None else 0


def walk_key(plan: WalkPlan, claims: Sequence[Claim], source: str) -> str:
    """Content key of the walk: the source, the tokens, the arithmetic, and every quantized claim."""
    spec = {
        "calibration": plan.calibration.content,
        "batch_tokens": plan.walk.batch_tokens,
        "dtype": plan.walk.dtype,
        "device": plan.device,
        "claims": quantized_content(claims),
    }
    if plan.walk.unlearned:
        # Depends on the memory that was free when the run was planned.
        spec["unlearned"] = plan.walk.unlearned
    return stage_key("walk", WALK_VERSION, spec, [source])
