"""What a polish adds to a plan: how it computes, its faults, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from compressor.calibration.spec import CalibrationSpec
from compressor.device import available_device_bytes, available_memory_bytes
from compressor.errors import UserError
from compressor.model.families import block_index, text_config
from compressor.planner.calibrated import WalkPlan
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.recipe.polish import PolishSection
from compressor.stages.base import Claim
from compressor.stages.polish import CHUNK_VALUES, PolishSpec, held_out_rows
from compressor.workspace import stage_key

POLISH_VERSION = 1
# Tokens of one forward pass, and the most logits that it makes: several copies of them are held.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_BATCH_LOGITS = {"cpu": 1 << 27, "cuda": 1 << 29}
_LOGIT_COPIES = 4
# fp32 copies of the logits that the loss works on at a time.
_CHUNK_COPIES = 6
_ASSUMED_VOCABULARY = 128_000
_ASSUMED_HIDDEN = 8192
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# fp32 numbers held for one that can move: before, exponent, gradient, the optimizer's four, temporaries.
_NUMBERS_EACH = 10
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
    device: Literal["cpu", "cuda"]
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
    if not any(claim.scheme is not None and _in_block(claim) for claim in claims):
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
    vocabulary = text_config(config).get("vocab_size")
    hidden = text_config(config).get("hidden_size")
    vocabulary = vocabulary if type(vocabulary) is int else _ASSUMED_VOCABULARY
    hidden = hidden if type(hidden) is int else _ASSUMED_HIDDEN
    length = walk.calibration.sequence_length
    tokens = min(_BATCH_TOKENS[walk.device], max(_BATCH_LOGITS[walk.device] // max(1, vocabulary), length))
    spec = PolishSpec(
        steps=section.steps,
        learning_rate=section.learning_rate,
        tokens=section.tokens,
        seed=seed if section.seed is None else section.seed,
        batch_tokens=tokens,
        dtype=walk.walk.dtype,
    )
    width = _DTYPE_BYTES[spec.dtype]
    parameters = sum(claim.tensor.numel for claim in claims)
    inside = [claim for claim in claims if claim.scheme is not None and _in_block(claim)]
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
        + 4 * _CHUNK_COPIES * CHUNK_VALUES
        + width * passed * (hidden * (len(walk.blocks) + _BLOCK_STATES) + vocabulary * _LOGIT_COPIES)
    )
    rows = held_out_rows(walk.calibration.num_samples)
    work = _PASSES * spec.steps * max(spec.tokens // length, 1) * length + _MEASURES * 2 * rows * length
    return PolishPlan(
        spec=spec,
        device=walk.device,
        held_bytes=held,
        stage_bytes=walk.walked_bytes + 4 * 4 * scales,
        time_s=2 * parameters * work / _FLOPS[walk.device],
    )


def polish_key(plan: PolishPlan, walked: str) -> str:
    """Content key of the polish; ``walked`` is the walk's."""
    return stage_key("polish", POLISH_VERSION, {**asdict(plan.spec), "device": plan.device}, [walked])


def _in_block(claim: Claim) -> bool:
    return block_index(claim.tensor.name) is not None
