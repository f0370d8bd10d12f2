"""The part of a report that ``compress verify`` adds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.report.record import Count, Measure, Record


class VerifyCheck(Record):
    """One check of ``compress verify`` and its finding in a sentence."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str


class EngineFacts(Record):
    """What a serving engine made of the checkpoint.

    Attributes:
        name: of the engine.
        version: of its package.
        device: what it ran on.
        dtype: what it computed in.
        plugins: of the engine, loaded while it ran: any may have replaced its kernels.
        verdict: ``agrees``, ``disagrees``, ``undecided`` (too much noise or too little to compare with),
            ``unsupported`` (this engine has no kernel for the format on this device) or ``failed``.
        reason: of the verdict, a sentence.
        tokens: whose log-probabilities were compared.
        mean_difference: of log-probabilities, engine against reference, nats; None where nothing was scored.
        max_difference: the largest, or None.
        noise_floor: mean difference for the unquantized source, or the typical one of the dtype.
        noise_floor_measured: whether it was measured in this run.
        effect: mean difference that quantization made, by the reference, or None without a source.
        greedy_tokens_equal: tokens of the greedy continuations before the first difference, all prompts.
        greedy_tokens: tokens of the greedy continuations.
        server: what became of the requests over HTTP, a sentence, or None where none was made.
    """

    name: str
    version: str
    device: str
    dtype: str
    plugins: tuple[str, ...]
    verdict: Literal["agrees", "disagrees", "undecided", "unsupported", "failed"]
    reason: str
    tokens: Count
    mean_difference: Measure | None
    max_difference: Measure | None
    noise_floor: Measure | None
    noise_floor_measured: bool
    effect: Measure | None
    greedy_tokens_equal: Count
    greedy_tokens: Count
    server: str | None


class Verification(Record):
    """The latest ``compress verify`` of the folder.

    Attributes:
        created: UTC, ``YYYY-MM-DDTHH:MM:SSZ``.
        passed: whether no check failed.
        checks: in the order in which they were made.
        engine: what an engine said, or None where none was asked.
    """

    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    passed: bool
    checks: tuple[VerifyCheck, ...]
    engine: EngineFacts | None
