"""Rows of what the evaluation measured beyond one figure for the whole text, for every view."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.report.measured import DomainQuality, Gate, GenerationFacts, SpeedFacts, Spread
from compressor.report.words import number, percent, size

DOMAIN_HEADS = ("domain", "documents", "tokens", "source", "result", "perplexity", "KL")
GENERATION_HEADS = ("continuations", "")
SPEED_HEADS = ("decoding", "source", "result", "result / source")


def interval_words(interval: tuple[float, float] | None, *, signed: bool = False) -> str:
    """`` (95%: +1.0% to +2.0%)``, or "" without one."""
    if interval is None:
        return ""
    low, high = (percent(end, signed=signed) for end in interval)
    return f" (95%: {low} to {high})"


def domain_rows(domains: Sequence[DomainQuality]) -> list[tuple[str, ...]]:
    """(domain, documents, tokens, perplexities, change with its interval, KL), where there are several."""
    if len(domains) < 2:
        return []
    return [
        (
            domain.name,
            f"{domain.documents:,}",
            f"{domain.scored_tokens:,}",
            number(domain.perplexity_source, 3),
            number(domain.perplexity_result, 3),
            percent(domain.increase, signed=True) + interval_words(domain.increase_ci95, signed=True),
            number(domain.kl_mean, 5),
        )
        for domain in domains
    ]


def generation_rows(found: GenerationFacts | None) -> list[tuple[str, str]]:
    """(what, figure) of greedy continuations."""
    if found is None:
        return []
    until = number(found.until_divergence, 1)
    if found.until_divergence_ci95 is not None:
        low, high = (number(end, 1) for end in found.until_divergence_ci95)
        until += f" (95%: {low} to {high})"
    return [
        (f"tokens of {found.new_tokens:,} before the first that differs, mean", until),
        ("the same token at the same place", percent(found.agreeing)),
        (f"the same to the end, of {found.prompts:,}", percent(found.identical)),
    ]


def speed_rows(found: SpeedFacts | None) -> list[tuple[str, str, str, str]]:
    """(what, source, result, result over source); medians with the lowest and highest of all runs."""
    if found is None:
        return []
    source, result = found.source, found.result
    first = result.first_token_s.median / source.first_token_s.median
    rows = [
        (
            "tokens a second",
            _spread(source.tokens_per_s, 1),
            _spread(result.tokens_per_s, 1),
            _spread(found.speedup, 2),
        ),
        (
            "seconds to the first token",
            _spread(source.first_token_s, 3),
            _spread(result.first_token_s, 3),
            number(first, 2),
        ),
        ("weights in memory", *_sizes(source.weight_bytes, result.weight_bytes)),
        ("KV cache", *_sizes(source.cache_bytes, result.cache_bytes)),
    ]
    if source.peak_device_bytes is not None and result.peak_device_bytes is not None:
        rows.append(("accelerator's memory", *_sizes(source.peak_device_bytes, result.peak_device_bytes)))
    return rows


def speed_caption(found: SpeedFacts) -> str:
    """How it was measured, and what it is not."""
    sequences = "1 sequence" if found.batch == 1 else f"{found.batch:,} sequences at once"
    text = (
        f"Measured on {found.device} with transformers in {found.dtype}: prompts of {found.prompt_tokens:,} "
        f"tokens, {found.new_tokens:,} made of each, {sequences}; medians of {found.runs} runs, source and "
        "result by turns, with the lowest and the highest."
    )
    if not found.runs_compressed:
        text += (
            " transformers holds the result's weights decoded: an engine that computes with the compressed "
            "ones needs less memory and time."
        )
    return text


def gate_notes(gates: Sequence[Gate]) -> list[str]:
    """What a person must know of verdicts, one sentence for each gate that has any."""
    return [f"{gate.metric}, {gate.verdict}: {gate.note}." for gate in gates if gate.note]


def _spread(found: Spread, digits: int) -> str:
    return f"{number(found.median, digits)} ({number(found.low, digits)} to {number(found.high, digits)})"


def _sizes(source: int, result: int) -> tuple[str, str, str]:
    return size(source), size(result), number(result / source, 2) if source else "-"
