"""The headline figures of a run, few enough to be read at a glance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from compressor.report.drafts import measured_passes, proposed
from compressor.report.long import kilo
from compressor.report.model import Quality, Report
from compressor.report.words import duration, number, percent, size

TILE_HEADS = ("of this result", "", "")
# Verdicts that say neither yes nor no.
_OPEN = ("UNCERTAIN", "SUSPICIOUS")


@dataclass(frozen=True)
class Tile:
    """A figure, what it is of, a line that says more, and whether it is good or bad as such."""

    label: str
    value: str
    detail: str
    tone: Literal["", "good", "bad"] = ""


def tiles(report: Report) -> list[Tile]:
    """Size, quality, context, cache, drafts, verdicts and cost: those that this run has."""
    return [*_gained(report), *_lost(report.quality), *_reach(report), *_verdicts(report), _cost(report)]


def _gained(report: Report) -> Iterator[Tile]:
    source, result = report.source, report.result
    if result.bytes:
        smaller = f"{number(source.bytes / result.bytes, 2)}x"
        yield Tile("Weights, times smaller", smaller, f"{size(source.bytes)} \u2192 {size(result.bytes)}")
    if result.schemes:
        bits = number(result.bits_per_target_weight, 2)
        whole = f"of those targeted; {number(result.bits_per_weight, 2)} of all"
        yield Tile("Bits of a weight", bits, whole)


def _lost(quality: Quality | None) -> Iterator[Tile]:
    if quality is None:
        yield Tile("Quality", "not measured", "the evaluation was skipped", "bad")
        return
    found = quality.perplexity
    detail = f"{number(found.source, 2)} \u2192 {number(found.result, 2)}"
    if found.increase_ci95 is not None:
        low, high = (percent(end, signed=True) for end in found.increase_ci95)
        detail += f"; 95%: {low} to {high}"
    yield Tile("Perplexity", percent(found.increase, signed=True), detail)
    agreement = percent(quality.top1_agreement)
    yield Tile("Same next token", agreement, f"KL divergence {number(quality.kl.mean, 4)} nats a token")
    kept = [
        (metric.result / metric.source, task, name)
        for task, metrics in quality.tasks.items()
        for name, metric in metrics.items()
        if metric.higher_is_better and metric.source > 0
    ]
    if kept:
        least, task, name = min(kept)
        which = f"{task} {name}" if len(kept) == 1 else f"{task} {name}, the least of {len(kept)}"
        yield Tile("Tasks kept", percent(least), f"of the source's {which}")


def _reach(report: Report) -> Iterator[Tile]:
    if report.context is not None:
        longer = f"tokens instead of {kilo(report.context.original_length)}"
        yield Tile("Context", kilo(report.context.length), longer)
    if report.kv is not None and report.kv.bytes_per_token:
        smaller = report.kv.bytes_per_token_before / report.kv.bytes_per_token
        detail = f"{report.kv.bytes_per_token_before:,} \u2192 {report.kv.bytes_per_token:,} bytes a token"
        yield Tile("KV cache, times smaller", f"{number(smaller, 2)}x", detail)
    passes = None if report.drafts is None else measured_passes(report.drafts)
    if report.drafts is not None and passes is not None:
        detail = "estimated on held-out texts"
        if decoded := proposed(report.drafts):
            domain, fastest = max(decoded, key=lambda pair: pair[1].speedup)
            detail = f"{number(fastest.speedup, 2)}x as fast on {domain}"
            detail += ", the fastest text" if len(decoded) > 1 else ""
        yield Tile("Tokens a pass", number(passes, 2), detail)


def _verdicts(report: Report) -> Iterator[Tile]:
    if report.gates:
        every = len(report.gates)
        failed = sum(not gate.passed for gate in report.gates)
        open_ones = [gate.verdict for gate in report.gates if gate.passed and gate.verdict in _OPEN]
        told = (f"{open_ones.count(word)} {word.lower()}" for word in _OPEN if word in open_ones)
        detail = ", ".join(told) or "limits that the recipe sets"
        passed = every - failed - len(open_ones)
        value = f"{failed} FAILED" if failed else f"{passed}{f' of {every}' if open_ones else ''} passed"
        yield Tile("Gates", value, detail, "bad" if failed else "" if open_ones else "good")
    found = report.verification
    if found is not None:
        engine = (
            f"{found.engine.name} {found.engine.version}: {found.engine.verdict}"
            if found.engine
            else "no engine"
        )
        yield Tile(
            "Verified", "passed" if found.passed else "FAILED", engine, "good" if found.passed else "bad"
        )


def _cost(report: Report) -> Tile:
    total = duration(sum(stage.wall_s for stage in report.stages))
    peak = max((stage.peak_rss_bytes for stage in report.stages), default=0)
    resumed = sum(stage.resumed for stage in report.stages)
    again = f"; {resumed} of {len(report.stages)} stages were done before" if resumed else ""
    return Tile("Time", total, f"{size(peak)} of memory at most{again}")
