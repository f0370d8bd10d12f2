"""What a polish adds to a plan: how it computes, its faults, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from compressor.calibration.spec import CalibrationSpec
from compressor.device import available_device_bytes, available_memory_bytes
from compressor.errors import UserError
from compressor.planner.calibrated import WalkPlan
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.planner.sizes import (
    BATCH_TOKENS,
    DTYPE_BYTES,
    Device,
    active_parameters,
    hidden_size,
    in_block,
    vocabulary_size,
)
from compressor.recipe.polish import PolishSection
from compressor.stages.base import Claim
from compressor.stages.polish import CHUNK_VALUES, PolishSpec, held_out_rows
from compressor.workspace import stage_key

POLISH_VERSION = 2
# The most logits that one forward pass makes: several copies of them are held.
_BATCH_LOGITS = {"cpu": 1 << 27, "cuda": 1 << 29}
_LOGIT_COPIES = 4
# fp32 copies of the logits that the loss works on at a time.
_CHUNK_COPIES = 6
# fp32 numbers held for one that can move: before (twice), value, exponent, gradient, the optimizer's four,
# temporaries.
_NUMBERS_EACH = 13
# A block's weights while it is passed backward, in fp32, and its activations, in hidden states.
_BLOCK_COPIES = 3
_BLOCK_STATES = 40
# Floating-point operations a second of two CPU cores, and of an accelerator; small models reach less.
_FLOPS = {"cpu": 8e10, "cuda": 5e13}
# Forward passes that one training token costs: the source's, the result's, that again, two on the way back.
_PASSES = 5
_MEASURES = 11


@dataclass(frozen=True)
class PolishPlan:
    """The polish of a plan.

    Attributes:
        spec: how it computes.
        device: ``cpu`` or ``cuda``; results differ in the last bits.
        held_bytes: of memory, on the device that computes.
        stage_bytes: of disk, for its tensors and its state.
        time_s: that it takes.
    """

    spec: PolishSpec
    device: Device
    held_bytes: int
    stage_bytes: int
    time_s: float

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with memory, disk and time of the polish."""
        rss = BASE_RSS_BYTES + (self.held_bytes if self.device == "cpu" else 0)
        return replace(
            prediction,
            peak_rss_bytes=max(prediction.peak_rss_bytes, rss),
            disk_bytes=prediction.disk_bytes + self.stage_bytes,
            time_s=prediction.time_s + self.time_s,
        )

    def warnings(self) -> list[str]:
        """Whether this machine's memory looks too small."""
        free = available_device_bytes() if self.device == "cuda" else available_memory_bytes()
        if self.held_bytes <= free:
            return []
        return [
            f"weights.polish holds source and result in memory, about {self.held_bytes / 1e9:.1f} GB; this "
            f"machine has {free / 1e9:.1f} GB free"
        ]


def check_polish(
    section: PolishSection, calibration: CalibrationSpec, claims: Sequence[Claim]
) -> list[UserError]:
    """Every reason why nothing could be polished so."""
    faults = []
    if not any(claim.scheme is not None and in_block(claim) for claim in claims):
        faults.append(
            UserError("nothing to polish: no matrix inside the blocks is quantized", where="weights.polish")
        )
    if section.tokens < calibration.sequence_length:
        faults.append(
            UserError(
                f"a step of {section.tokens} tokens holds no whole sequence of {calibration.sequence_length}",
                where="weights.polish.tokens",
                fix=f"set it to {calibration.sequence_length} at least, or calibration.sequence_length lower",
            )
        )
    if calibration.num_samples < 2:
        faults.append(
            UserError(
                "a polish needs two calibration sequences at least: one is held out to judge it by",
                where="weights.polish",
                fix="set calibration.num_samples to 2 or more",
            )
        )
    return faults


def plan_polish(
    section: PolishSection, walk: WalkPlan, claims: Sequence[Claim], config: dict[str, Any], seed: int
) -> PolishPlan:
    """Decides dtype and batches of a polish, and what it costs; ``seed`` is the recipe's."""
    vocabulary, hidden = vocabulary_size(config), hidden_size(config)
    length = walk.calibration.sequence_length
    tokens = min(BATCH_TOKENS[walk.device], max(_BATCH_LOGITS[walk.device] // vocabulary, length))
    spec = PolishSpec(
        steps=section.steps,
        learning_rate=section.learning_rate,
        tokens=section.tokens,
        seed=seed if section.seed is None else section.seed,
        batch_tokens=tokens,
        dtype=walk.walk.dtype,
    )
    width = DTYPE_BYTES[spec.dtype]
    parameters = sum(claim.tensor.numel for claim in claims)
    inside = [claim for claim in claims if claim.scheme is not None and in_block(claim)]
    codes = sum(claim.tensor.numel for claim in inside)
    scales = sum(
        output.numel for claim in inside for output in claim.outputs if output.name.endswith("weight_scale")
    )
    passed = min(max(tokens, length), spec.tokens)
    block = max(walk.blocks, default=0) // width
    held = (
        width * parameters
        + codes
        + 4 * _NUMBERS_EACH * scales
        + 4 * _BLOCK_COPIES * block
        + 4 * _CHUNK_COPIES * CHUNK_VALUES[walk.device]
        + width * passed * (hidden * (len(walk.blocks) + _BLOCK_STATES) + vocabulary * _LOGIT_COPIES)
    )
    rows = held_out_rows(walk.calibration.num_samples)
    work = _PASSES * spec.steps * max(spec.tokens // length, 1) * length + _MEASURES * 2 * rows * length
    return PolishPlan(
        spec=spec,
        device=walk.device,
        held_bytes=held,
        stage_bytes=walk.walked_bytes + 4 * 4 * scales,
        time_s=2 * active_parameters(claims, config) * work / _FLOPS[walk.device],
    )


def polish_key(plan: PolishPlan, walked: str) -> str:
    """Content key of the polish; ``walked`` is the walk's."""
    return stage_key("polish", POLISH_VERSION, {**asdict(plan.spec), "device": plan.device}, [walked])
