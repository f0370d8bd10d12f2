"""What a plan will cost and give: bytes, bits per weight, memory, disk, time and GPUs. Arithmetic only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil
from typing import Any

from compressor.model.families import tied
from compressor.planner.kv_bytes import KvBytes, full_context, kv_bytes
from compressor.stages.base import Claim, Unit
from compressor.stages.stream import jobs_of

GPU_MEMORY_GB = (24, 48, 80, 141)
# vLLM's default --gpu-memory-utilization; the rest is its activations and the driver's context.
GPU_USABLE = 0.9
# Python with torch, transformers and compressed-tensors loaded, before any weight: 571 MB were measured.
BASE_RSS_BYTES = 700_000_000
# Temporaries of a solve: chunks of rows, bounded; a small matrix is one chunk, with three fp32 copies.
CHUNK_BYTES = 400_000_000
CHUNK_COPIES = 3
# Source bytes a second of a tensor that is copied (scripts/bench.py stream, rounded down).
RATE_COPY = 400e6


@dataclass(frozen=True)
class RuleRow:
    """One line of the plan's table: a rule, what it matched and what that becomes."""

    rule: str
    stored_as: str
    reason: str
    tensors: int
    parameters: int
    bytes_before: int
    bytes_after: int
    example: str


@dataclass(frozen=True)
class Prediction:
    """Everything that the plan states in numbers; bytes are bytes, seconds are seconds.

    ``source_bytes`` counts the source in 16 bit, and like ``parameters`` a tied pair of embedding and head
    once, though both be stored; both bits-per-weight figures count scales
    (``bits_per_weight`` over all parameters, ``bits_per_target_weight`` over those that rules quantize, or
    leave in 16 bit by choice). GPU
    counts are by memory size in GB: with one request at full context, and for the weights alone.
    """

    parameters: int
    target_parameters: int
    source_bytes: int
    result_bytes: int
    bits_per_weight: float
    bits_per_target_weight: float
    peak_rss_bytes: int
    disk_bytes: int
    time_s: float
    kv: KvBytes | None
    kv_reason: str
    context: int | None
    gpus_before: dict[int, int]
    gpus_after: dict[int, int]
    gpus_weights_before: dict[int, int]
    gpus_weights_after: dict[int, int]


def rule_rows(claims: Sequence[Claim]) -> list[RuleRow]:
    """Claims summed by rule, what they become, and why."""
    grouped: dict[tuple[str, str, str], list[Claim]] = defaultdict(list)
    for claim in claims:
        stored = claim.stored.label if claim.stored else _copied_as(claim)
        grouped[claim.rule, stored, claim.reason].append(claim)
    rows = [
        RuleRow(
            rule,
            stored,
            reason,
            len(members),
            sum(claim.tensor.numel for claim in members),
            sum(claim.bytes_16bit for claim in members),
            sum(claim.result_bytes for claim in members),
            members[0].tensor.name,
        )
        for (rule, stored, reason), members in grouped.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes_before)


def _copied_as(claim: Claim) -> str:
    return claim.outputs[0].dtype if claim.outputs[0].dtype != claim.tensor.dtype else "copied"


def predict(
    claims: Sequence[Claim], units: Sequence[Unit], config: dict[str, Any], source_download_bytes: int
) -> Prediction:
    """The plan's numbers; ``source_download_bytes`` is what a Hub source will put on disk."""
    counted = tied_once(claims, config)
    parameters = sum(claim.tensor.numel for claim in counted)
    targets = [claim for claim in claims if claim.is_target]
    target_parameters = sum(claim.tensor.numel for claim in targets)
    result_bytes = sum(claim.result_bytes for claim in claims)
    source_bytes = sum(claim.bytes_16bit for claim in counted)
    context = full_context(config)
    kv, kv_reason = kv_bytes(config, context) if context else (None, "no max_position_embeddings")
    kv_full = kv.total_bytes if kv else 0
    return Prediction(
        parameters=parameters,
        target_parameters=target_parameters,
        source_bytes=source_bytes,
        result_bytes=result_bytes,
        bits_per_weight=8 * result_bytes / parameters,
        bits_per_target_weight=8 * sum(claim.result_bytes for claim in targets) / max(1, target_parameters),
        peak_rss_bytes=_peak_rss(units),
        # The output shares its shards with the workspace (hard links), so they count once.
        disk_bytes=result_bytes + source_download_bytes,
        time_s=sum(_seconds(claim) for claim in claims),
        kv=kv,
        kv_reason=kv_reason,
        context=context,
        gpus_before=gpus_needed(source_bytes, kv_full),
        gpus_after=gpus_needed(result_bytes, kv_full),
        gpus_weights_before=gpus_needed(source_bytes, 0),
        gpus_weights_after=gpus_needed(result_bytes, 0),
    )


def tied_once(claims: Sequence[Claim], config: dict[str, Any]) -> list[Claim]:
    """The claims without a stored head that is the stored embedding once more."""
    kinds = {claim.role.kind for claim in claims}
    if "embedding" not in kinds or not tied(config, [claim.tensor.name for claim in claims]):
        return list(claims)
    return [claim for claim in claims if claim.role.kind != "lm_head"]


def gpus_needed(weight_bytes: int, kv_bytes_full: int) -> dict[int, int]:
    """GPUs of each memory size (GB) that hold the weights and a KV cache of ``kv_bytes_full``.

    A lower bound: both divided evenly, 90% of the memory usable.
    """
    needed = weight_bytes + kv_bytes_full
    return {memory: ceil(needed / (memory * 1e9 * GPU_USABLE)) for memory in GPU_MEMORY_GB}


def _peak_rss(units: Sequence[Unit]) -> int:
    """Base + the most that a job and the next one take, which is read ahead, with what solving the job takes:
    what its largest matrix decodes to in fp32, and temporaries.
    """
    jobs = [job for unit in units for job in jobs_of(unit)]
    most = 0
    for job, following in zip_longest(jobs, jobs[1:]):
        decoded = 4 * max((part.out_features * part.in_features for _, part in job.parts), default=0)
        held = job.held_bytes + decoded + min(CHUNK_BYTES, CHUNK_COPIES * decoded)
        most = max(most, job.read_bytes, held + (following.read_bytes if following is not None else 0))
    return BASE_RSS_BYTES + most


def _seconds(claim: Claim) -> float:
    if claim.solver is None:
        return claim.tensor.nbytes / RATE_COPY
    return claim.bytes_16bit / claim.solver.bytes_per_s
