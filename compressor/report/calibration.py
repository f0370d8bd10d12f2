"""The part of a report that says what the weights were calibrated on, and what it did for each matrix."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compressor.report.record import Count, Measure, Record

_Some = Annotated[int, Field(gt=0)]


class CalibrationText(Record):
    """One dataset of the mixture, and how many tokens were taken from it."""

    name: str
    tokens: Count


class CalibratedMatrix(Record):
    """One weight matrix whose values a solver chose with calibration data.

    Both errors are relative squared errors of the layer's output on the calibration tokens themselves, where
    the layers before it are quantized already; None where no token reached the matrix.

    Attributes:
        name: of the matrix.
        scheme: how it is stored.
        solver: whose values are stored: the solver's, or ``rtn`` where they were no better than those.
        output_error: with the stored values.
        rtn_output_error: with the values of plain round to nearest.
        tokens: how many calibration tokens reached the matrix: all, but for experts.
        note: why ``rtn`` was used, where it was.
    """

    name: str
    scheme: str
    solver: str
    output_error: Measure | None
    rtn_output_error: Measure | None
    tokens: Count
    note: str | None = None


class PolishFacts(Record):
    """The distillation after all layers were solved.

    Attributes:
        steps: of the optimizer.
        kept: whether its values are stored; else those before it, since the held-out rows got no nearer.
        kl_before: divergence from source to result on calibration rows that were held out, nats a token.
        kl_after: the same of what is stored; the best of several steps, chosen on these rows.
        held_out_tokens: of these rows.
        scales: how many values could move.
        changed_16bit: the norms and biases that are not the source's any more.
        seconds: that it took.
    """

    steps: _Some
    kept: bool
    kl_before: Measure
    kl_after: Measure
    held_out_tokens: _Some
    scales: _Some
    changed_16bit: tuple[str, ...]
    seconds: Measure


class CalibrationFacts(Record):
    """The calibration of one run.

    Attributes:
        texts: what the tokens come from.
        samples: sequences.
        sequence_length: tokens of each.
        seed: that chose them.
        dtype: of the forward passes.
        matrices: all that were solved with data, in the order in which they are stored.
        polish: what followed, or None where nothing did; the matrices' errors are those before it.
        changed_16bit: tensors left in 16 bit that a transform changed, whose layers are not the source's one
            by one any more.
    """

    texts: tuple[CalibrationText, ...]
    samples: _Some
    sequence_length: _Some
    seed: int
    dtype: str
    matrices: tuple[CalibratedMatrix, ...]
    polish: PolishFacts | None = None
    changed_16bit: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """All tokens of all sequences."""
        return self.samples * self.sequence_length
