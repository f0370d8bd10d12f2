"""What every view shows of a report, as plain strings: one place decides which figures, in which words.

Strings that come from the report's names are not escaped here; each view escapes for its own language.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from compressor.report.measured import Gate, TaskMetric
from compressor.report.model import Quality, Report, ResultFacts
from compressor.report.verification import EngineFacts, Verification
from compressor.report.words import BYTE_UNITS, duration, number, percent, size

UNMEASURED = "quality not measured"
UNVERIFIED = "not verified yet: `compress verify` proves that the checkpoint loads and is served rightly"


@dataclass(frozen=True)
class Measured:
    """One line of the quality table; ``recovery`` is what share of the source's figure is kept."""

    measure: str
    source: str
    result: str
    change: str
    recovery: str


@dataclass(frozen=True)
class Segment:
    """A part of the bytes before or after; ``kind`` picks its colour."""

    kind: str
    title: str
    bytes: int


def headline(report: Report) -> str:
    """One sentence: how much smaller, how much further it reads, at what loss."""
    source, result = report.source.bytes, report.result.bytes
    smaller = f"{number(source / result, 2)}x smaller" if result else "no tensors"
    sizes = f"{smaller} ({size(source)} -> {size(result)})"
    if source == result and not report.result.schemes:
        sizes = f"weights in 16 bit ({size(result)})"
    if report.context is not None:
        sizes += f", reads {report.context.length:,} tokens instead of {report.context.original_length:,}"
    text = f"{sizes}, {_loss(report.quality)}"
    failed = sum(not gate.passed for gate in report.gates)
    return f"{text}; {failed} of {len(report.gates)} gates FAILED" if failed else text


def _loss(quality: Quality | None) -> str:
    if quality is None:
        return UNMEASURED
    perplexity = quality.perplexity
    return (
        f"perplexity {percent(perplexity.increase, signed=True)} "
        f"({number(perplexity.source, 2)} -> {number(perplexity.result, 2)})"
    )


def gained_rows(report: Report) -> list[tuple[str, str, str]]:
    """(measure, before, after) of the sizes."""
    source, result = report.source, report.result
    before = 8 * source.bytes / source.parameters
    rows = [
        ("tensors", size(source.bytes), size(result.bytes)),
        ("bits per weight", number(before, 2), number(result.bits_per_weight, 2)),
    ]
    targets = sum(scheme.source_bytes for scheme in result.schemes.values())
    if result.target_parameters:
        rows.append(
            (
                "bits per targeted weight",
                number(8 * targets / result.target_parameters, 2),
                number(result.bits_per_target_weight, 2),
            )
        )
    return rows


def scheme_rows(report: Report) -> list[tuple[str, str, str, str, str]]:
    """(scheme, tensors, weights, bytes, relative error) of what is quantized."""
    errors = report.weights.relative_error
    return [
        (
            label,
            f"{stored.tensors:,}",
            f"{stored.parameters:,}",
            size(stored.bytes),
            number(errors[label].mean, 5) if label in errors else "not measured",
        )
        for label, stored in report.result.schemes.items()
    ]


def worst_rows(report: Report) -> list[tuple[str, str, str]]:
    """(scheme, tensor, relative error) of the matrices that quantization hurt most."""
    return [
        (label, tensor.name, number(tensor.relative_error, 5))
        for label, errors in report.weights.relative_error.items()
        for tensor in errors.worst
    ]


def kept_rows(report: Report) -> list[tuple[str, str, str]]:
    """(reason, tensors, bytes) of what stays in 16 bit."""
    return [(kept.reason, f"{kept.tensors:,}", size(kept.bytes)) for kept in report.result.left_16bit]


def quality_rows(quality: Quality) -> list[Measured]:
    """Perplexity, divergence, agreement and every task metric."""
    perplexity = quality.perplexity
    change = percent(perplexity.increase, signed=True)
    if perplexity.increase_ci95 is not None:
        low, high = perplexity.increase_ci95
        change += f" (95%: {percent(low, signed=True)} to {percent(high, signed=True)})"
    rows = [
        Measured("perplexity", number(perplexity.source, 3), number(perplexity.result, 3), change, "-"),
        Measured("KL divergence, mean (nats/token)", "0", number(quality.kl.mean, 5), "-", "-"),
        Measured("KL divergence, 99.9th percentile", "0", number(quality.kl.p999, 4), "-", "-"),
        Measured("top-1 agreement", "100.0%", percent(quality.top1_agreement), "-", "-"),
    ]
    return rows + list(task_rows(quality.tasks))


def task_rows(tasks: Mapping[str, Mapping[str, TaskMetric]]) -> Iterator[Measured]:
    """Every metric of every task, what is kept with its interval."""
    for task, metrics in tasks.items():
        for metric, figures in metrics.items():
            kept = figures.higher_is_better and math.isfinite(figures.source) and figures.source > 0
            change = f"{'+' if figures.difference >= 0 else ''}{number(figures.difference, 4)}"
            change += f" (standard error {number(figures.stderr, 4)}"
            if kept and figures.recovery_ci95 is not None:
                change += f"; kept {percent(figures.result / figures.source)}, 95%: "
                change += " to ".join(percent(end) for end in figures.recovery_ci95)
            yield Measured(
                f"{task} {metric} (n={figures.n:,})",
                number(figures.source, 4),
                number(figures.result, 4),
                f"{change})",
                percent(figures.result / figures.source) if kept else "-",
            )


_READERS = {
    "transformers": " by transformers",
    "factory": ", in the modules of its package with weights decoded by this program",
    "decoded": ", decoded by this program, since transformers cannot read experts stored one by one",
}


def quality_caption(report: Report) -> str:
    """On what the quality was measured; with the source's peculiarity, so that no table lacks it."""
    quality = report.quality
    if quality is None:
        text = "The evaluation was skipped: nothing is known about what this result lost."
    else:
        text = (
            f"{quality.tokens:,} tokens of {quality.text}, windows of {quality.context:,}; "
            f"the result as reloaded from disk{_READERS[quality.loaded_via]}. "
            f"Computed in {quality.text_dtype} on the text"
            + (f", in {quality.task_dtype} on the tasks." if quality.tasks else ".")
        )
        if quality.activations_simulated is False:
            text += (
                " Activations stayed unquantized, unlike in an engine: the loss shown is that of the weights."
            )
    return f"{text} {source_caption(report)}".strip()


def source_caption(report: Report) -> str:
    """What a reader must know about the source, as a sentence; "" where there is nothing."""
    return f"Source: {report.source.note.rstrip('.')}." if report.source.note else ""


def size_caption(report: Report) -> str:
    """What the byte figures count."""
    text = f"Bytes of tensors, the source at 16 bit; scales included; tied weights once. {BYTE_UNITS}."
    return f"{text} {source_caption(report)}".strip()


def gate_row(gate: Gate) -> tuple[str, str, str, str]:
    """(metric, what was measured with its interval, allowed, verdict)."""
    verdict = gate.verdict or ("PASS" if gate.passed else "FAIL")
    if gate.min_recovery is not None:
        allowed = f"{percent(gate.min_recovery)} kept"
        found, ends = percent(gate.value), [percent(end) for end in gate.interval or ()]
    else:
        tell = partial(percent, signed=True) if gate.metric == "perplexity" else partial(number, digits=4)
        allowed = tell(gate.max_increase) if gate.max_increase is not None else "-"
        found, ends = tell(gate.value), [tell(end) for end in gate.interval or ()]
        if gate.metric not in ("perplexity", "kl"):
            # Of an accuracy, whose change stands beside it with the other sign.
            found, allowed = f"{found} lost", f"{allowed} lost"
    if ends:
        found += f" ({100 * (gate.confidence or 0.95):g}%: {' to '.join(ends)})"
    return gate.metric, found, allowed, verdict


def gate_sentence(gate: Gate) -> str:
    """``perplexity FAIL: 0.4 (95%: 0.3 to 0.5), allowed 0.35``, and what there is to know."""
    metric, found, allowed, verdict = gate_row(gate)
    return f"{metric} {verdict}: {found}, allowed {allowed}{'; ' + gate.note if gate.note else ''}"


def stage_rows(report: Report) -> list[tuple[str, str, str, str, str]]:
    """(stage, time, peak memory, peak device memory, whether it was resumed), and the total."""
    rows = [
        (
            stage.name,
            duration(stage.wall_s),
            size(stage.peak_rss_bytes),
            size(stage.peak_device_bytes) if stage.peak_device_bytes else "-",
            "yes" if stage.resumed else "no",
        )
        for stage in report.stages
    ]
    total = duration(sum(stage.wall_s for stage in report.stages))
    peak = size(max((stage.peak_rss_bytes for stage in report.stages), default=0))
    device = max((stage.peak_device_bytes for stage in report.stages), default=0)
    return [*rows, ("all", total, peak, size(device) if device else "-", "")]


def segments(report: Report) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The bytes before and after, by kind."""
    result = report.result
    targets = sum(scheme.source_bytes for scheme in result.schemes.values())
    before = (
        Segment("target", "to be quantized, 16 bit", targets),
        Segment("rest", "left in 16 bit", max(report.source.bytes - targets, 0)),
    )
    return before, _segments_after(result)


def _segments_after(result: ResultFacts) -> tuple[Segment, ...]:
    quantized = sum(scheme.bytes for scheme in result.schemes.values())
    scales = sum(scheme.scale_bytes for scheme in result.schemes.values())
    return (
        Segment("codes", "quantized codes", max(quantized - scales, 0)),
        Segment("scales", "scales", scales),
        Segment("rest", "left in 16 bit", max(result.bytes - quantized, 0)),
    )


def check_rows(found: Verification) -> list[tuple[str, str, str]]:
    """(check, status, finding) in the order in which they were made."""
    return [(check.name, check.status, check.detail) for check in found.checks]


def engine_rows(engine: EngineFacts | None) -> list[tuple[str, str]]:
    """(what, finding) of the engine's answer; empty where none was asked."""
    if engine is None:
        return []
    plugins = f", with plug-ins {', '.join(engine.plugins)}" if engine.plugins else ""
    rows = [
        ("program", f"{engine.name} {engine.version} on {engine.device}, {engine.dtype}{plugins}"),
        ("verdict", engine.verdict),
        ("because", engine.reason),
    ]
    if engine.max_difference is not None:
        rows.append(("largest difference", f"{number(engine.max_difference, 4)} nats"))
    if engine.greedy_tokens:
        equal = f"{engine.greedy_tokens_equal} of {engine.greedy_tokens} tokens before the first difference"
        rows.append(("greedy text", equal))
    if engine.server is not None:
        rows.append(("server", engine.server))
    return rows


def verdict(found: Verification) -> str:
    """One sentence: whether the checkpoint is what it should be, and who says so."""
    failed = [check.name for check in found.checks if check.status == "failed"]
    if failed:
        return f"FAILED: {', '.join(failed)}"
    engine = found.engine
    if engine is None:
        return "passed, without an engine" if found.passed else "FAILED: no engine was asked"
    if engine.verdict == "agrees":
        return f"passed: {engine.name} {engine.version} loads it and agrees"
    word = "passed, but not proven by the engine" if found.passed else "FAILED"
    return f"{word}: {engine.name} {engine.version}: {engine.verdict}"
