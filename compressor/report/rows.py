"""What every view shows of a report, as plain strings: one place decides which figures, in which words.

Strings that come from the report's names are not escaped here; each view escapes for its own language.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compressor.report.calibration import CalibratedMatrix, CalibrationFacts, PolishFacts, SmoothedInput
from compressor.report.experts import expert_notes
from compressor.report.learned import learned_note
from compressor.report.model import Gate, Quality, Report, ResultFacts
from compressor.report.verification import EngineFacts, Verification
from compressor.report.words import BYTE_UNITS, duration, number, percent, size, some_names

UNMEASURED = "quality not measured"
UNVERIFIED = "not verified yet: `compress verify` proves that the checkpoint loads and is served rightly"

SOLVER_HEADS = ("scheme", "values from", "matrices", "error of rtn", "error", "change")
WORST_OUTPUT_HEADS = ("scheme", "worst matrices", "error of rtn", "error")
# What the errors of both tables are.
ADDED_ERRORS = (
    "An error is what rounding added: the squared error of a layer's output with the stored weights, less "
    "that with the real numbers which were rounded to them (the source's weights, corrected for what the "
    "quantized layers before hand on), over the output's squared norm. What those real numbers are off the "
    "source's layer is not in it, so errors do not add up to the model's. They are measured on these very "
    "tokens, to which the values were fitted, not on held-out text; tokens of outlying inputs are weighted "
    "down. Means count alike every matrix that any of the tokens reached."
)
_WORST_OUTPUTS = 5


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
    return rows + list(_task_rows(quality))


def _task_rows(quality: Quality) -> Iterator[Measured]:
    for task, metrics in quality.tasks.items():
        for metric, figures in metrics.items():
            kept = figures.higher_is_better and math.isfinite(figures.source) and figures.source > 0
            yield Measured(
                f"{task} {metric} (n={figures.n:,})",
                number(figures.source, 4),
                number(figures.result, 4),
                f"{'+' if figures.difference >= 0 else ''}{number(figures.difference, 4)} "
                f"(standard error {number(figures.stderr, 4)})",
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
    """(metric, increase, allowed, verdict)."""
    verdict = "passed" if gate.passed else "FAILED"
    return gate.metric, number(gate.value, 4), number(gate.max_increase, 4), verdict


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


def calibration_caption(report: Report) -> str:
    """What the solvers were shown, and what the errors of the tables are; "" where nothing was shown."""
    facts = report.calibration
    if facts is None:
        return ""
    texts = ", ".join(f"{text.name} ({text.tokens:,})" for text in facts.texts)
    text = (
        f"{facts.tokens:,} tokens: {facts.samples:,} sequences of {facts.sequence_length:,} from {texts}; "
        f"seed {facts.seed}; forward passes in {facts.dtype}."
    )
    if any(matrix.output_error is not None for matrix in facts.matrices):
        text += f" {ADDED_ERRORS}"
    return f"{text} {source_caption(report)}".strip()


def solver_rows(facts: CalibrationFacts) -> list[tuple[str, str, str, str, str, str]]:
    """(scheme, whose values, matrices, mean error of round to nearest, mean error, change), and all together.

    Means are arithmetic, over the matrices that any token reached.
    """
    groups: dict[tuple[str, str], list[CalibratedMatrix]] = {}
    for matrix in facts.matrices:
        groups.setdefault((matrix.scheme, matrix.solver), []).append(matrix)
    rows = [(*group, *_mean_errors(groups[group])) for group in sorted(groups)]
    return [*rows, ("all", "", *_mean_errors(facts.matrices))] if len(rows) > 1 else rows


def _mean_errors(matrices: Sequence[CalibratedMatrix]) -> tuple[str, str, str, str]:
    pairs = [
        (matrix.rtn_output_error, matrix.output_error)
        for matrix in matrices
        if matrix.rtn_output_error is not None and matrix.output_error is not None
    ]
    count = f"{len(matrices):,}"
    if not pairs:
        return count, "-", "-", "-"
    if len(pairs) < len(matrices):
        count = f"{len(pairs):,} of {count}"
    rtn, stored = (sum(errors) / len(pairs) for errors in zip(*pairs, strict=True))
    change = percent(stored / rtn - 1, signed=True) if rtn and stored != rtn else "-"
    return count, number(rtn, 5), number(stored, 5), change


def worst_output_rows(facts: CalibrationFacts) -> list[tuple[str, str, str, str]]:
    """(scheme, matrix, error of round to nearest, error) of the matrices whose outputs are furthest off."""
    heard = [(matrix.output_error, matrix) for matrix in facts.matrices if matrix.output_error is not None]
    ranked = sorted(heard, key=lambda pair: (math.isnan(pair[0]), pair[0]), reverse=True)
    return [
        (
            matrix.scheme,
            matrix.name,
            "-" if matrix.rtn_output_error is None else number(matrix.rtn_output_error, 5),
            number(error, 5),
        )
        for error, matrix in ranked[:_WORST_OUTPUTS]
    ]


def calibration_notes(facts: CalibrationFacts) -> list[str]:
    """What polish, smoothing and learning did, and where calibration changed nothing or knew little."""
    polished = [] if facts.polish is None else [_polish_note(facts.polish)]
    polished += [_smoothing_note(facts.smoothed)] if facts.smoothed else []
    polished += [learned_note(facts.blocks)] if facts.blocks else []
    kept = [
        matrix.name for matrix in facts.matrices if matrix.solver == "rtn" and matrix.output_error is not None
    ]
    if not kept:
        return [*polished, *expert_notes(facts)]
    said = (
        "Matrices that keep the values of round to nearest (rtn), since the solver's were no better on these "
        f"tokens: {len(kept):,} of {len(facts.matrices):,}: {some_names(kept)}."
    )
    return [*polished, said, *expert_notes(facts)]


def _smoothing_note(smoothed: Sequence[SmoothedInput]) -> str:
    moved = [found for found in smoothed if found.ratio is not None]
    text = f"Smoothing: scales of {len(moved):,} of {len(smoothed):,} inputs were folded into what makes them"
    matrices = [matrix for found in moved for matrix in found.matrices]
    if not matrices:
        return f"{text}."
    before = sum(matrix.error_before for matrix in matrices) / len(matrices)
    after = sum(matrix.error_after for matrix in matrices) / len(matrices)
    return (
        f"{text}; with round to nearest, the mean output error of the {len(matrices):,} matrices that read "
        f"them, on some of the source's inputs: {number(before, 5)} before, {number(after, 5)} after. Errors "
        "of their weights are relative to the scaled weights."
    )


def _polish_note(facts: PolishFacts) -> str:
    where = f"on {facts.held_out_tokens:,} calibration tokens that it was not trained on"
    did = f"{facts.steps:,} steps in {facts.seconds:,.0f} s over {facts.scales:,} scales, norms and biases"
    before = number(facts.kl_before, 5)
    if not facts.kept:
        return f"Polish: {did} brought the result no nearer to the source than KL {before} {where}; not kept."
    after = f"{number(facts.kl_after, 5)} ({percent(facts.kl_after / facts.kl_before - 1, signed=True)})"
    return (
        f"Polish: {did}; mean KL from the source {where}: {before} before, {after} after, at the best of the "
        "steps measured there. The errors of single matrices are those before the polish."
    )
