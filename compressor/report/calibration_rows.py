"""What the views show of a calibration, as plain strings: what was heard, and what solvers gained by it.

Strings that come from the report's names are not escaped here; each view escapes for its own language.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from compressor.report.calibration import CalibratedMatrix, CalibrationFacts, PolishFacts, SmoothedInput
from compressor.report.experts import expert_notes
from compressor.report.learned import learned_note
from compressor.report.model import Report
from compressor.report.rows import source_caption
from compressor.report.words import number, percent, some_names

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
