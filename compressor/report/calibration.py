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

    Both errors are what rounding added to the layer's output on the calibration tokens themselves, beyond the
    real numbers that were rounded (``calibration_rows.ADDED_ERRORS`` says it in full); None where no token
    reached it, or where the solver does not measure it.

    Attributes:
        name: of the matrix.
        scheme: how it is stored.
        solver: whose values are stored: the solver's, or ``rtn`` where they were no better than those.
        output_error: with the stored values.
        rtn_output_error: with the values of plain round to nearest (after smoothing, of the scaled weights).
        tokens: how many calibration tokens reached the matrix: all, but for experts; None where the solver
            does not look at its inputs by itself.
        note: why ``rtn`` was used, where it was.
        topped_up: how many tokens that the router sent to other experts the matrix was solved on as well.
    """

    name: str
    scheme: str
    solver: str
    output_error: Measure | None
    rtn_output_error: Measure | None
    tokens: Count | None
    note: str | None = None
    topped_up: Count = 0


class SmoothedMatrix(Record):
    """One matrix that reads an input whose scales may have moved.

    Both errors are squared errors of its output with plain round to nearest over the output's square, on some
    calibration tokens as the source model feeds them, inputs rounded as the scheme says.
    """

    name: str
    error_before: Measure
    error_after: Measure


class SmoothedInput(Record):
    """An input of matrices, whose per-channel scales solver ``smooth`` could move into what makes it.

    Attributes:
        made_by: the norm's weight, or the matrix, that makes it.
        readers: the source tensors that read it.
        form: of what the scales were made: ``inputs`` (their mean magnitude to the exponent), ``both`` (over
            that of the weights to one less the exponent) or ``peaks`` (the same of the largest); None where
            nothing was moved.
        ratio: the exponent.
        matrices: those that are quantized; errors of weights are relative to the scaled weights.
        note: why nothing was moved, or None.
    """

    made_by: str
    readers: tuple[str, ...]
    form: str | None
    ratio: Measure | None
    matrices: tuple[SmoothedMatrix, ...]
    note: str | None


class ExpertCoverage(Record):
    """How many calibration tokens the experts of one layer were sent.

    Attributes:
        name: of the module of experts.
        experts: how many there are.
        tokens: of one expert: the fewest, the median, the most.
        enough: tokens without which an expert is starved: an eighth of its inputs' width.
        starved: experts that were sent fewer.
        topped_up: experts that were solved on tokens as well that the router sent to others.
        topped_up_tokens: how many of these all of them got together.
        never_reached: experts that were sent none.
        scored: whether those tokens were the ones that the router scored highest for the expert; else its
            scores could not be heard, and they are spread evenly over the text.
        shared_range: whether the experts' static input scales are of what any of them was sent.
    """

    name: str
    experts: _Some
    tokens: tuple[Count, Measure, Count]
    enough: _Some
    starved: Count
    topped_up: Count
    topped_up_tokens: Count
    never_reached: Count
    scored: bool
    shared_range: bool


class LearnedBlock(Record):
    """One block whose matrices were to be learned together.

    Both errors are squared errors of the block's output over the squared norm of the source's, outlying
    tokens weighted down, on calibration sequences that were held out; None where nothing was learned.

    Attributes:
        name: of the block.
        before: as the matrices were before.
        after: as they are stored; the best of several steps, chosen on these sequences.
        tokens: held out.
        skipped: why nothing was learned, or None.
    """

    name: str
    before: Measure | None
    after: Measure | None
    tokens: Count
    skipped: str | None


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
        blocks: those whose matrices were learned together; the matrices' output errors are those before.
        polish: what followed, or None where nothing did; the matrices' errors are those before it.
        changed_16bit: tensors left in 16 bit that a transform changed, whose layers are not the source's one
            by one any more.
        smoothed: the inputs that solver ``smooth`` looked at; empty without it.
        experts: of every layer whose experts were calibrated.
    """

    texts: tuple[CalibrationText, ...]
    samples: _Some
    sequence_length: _Some
    seed: int
    dtype: str
    matrices: tuple[CalibratedMatrix, ...]
    blocks: tuple[LearnedBlock, ...] = ()
    polish: PolishFacts | None = None
    changed_16bit: tuple[str, ...] = ()
    smoothed: tuple[SmoothedInput, ...] = ()
    experts: tuple[ExpertCoverage, ...] = ()

    @property
    def tokens(self) -> int:
        """All tokens of all sequences."""
        return self.samples * self.sequence_length
