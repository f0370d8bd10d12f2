"""A block of the walk trained as a whole, once its matrices are solved: its output is to be the source's.

The inputs are those that the result's blocks before give, the target what the source's own states become in
the source's block (arXiv:2309.05516 with quantized inputs). Parameters take the rounded weights, and their
gradients are taken to what is learned of each matrix (``learn_matrix.py``).

Legend: B sequences of a batch, T tokens, H hidden size, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING

import torch

from compressor.numerics.row_weights import row_weights
from compressor.solvers.base import LEARNED_BYTES
from compressor.stages.base import Started
from compressor.stages.learn_matrix import LearnedMatrix
from compressor.stages.polish import held_out_rows
from compressor.stages.receipts import BlockError
from compressor.stages.training import row_order

if TYPE_CHECKING:
    from compressor.model.blocks import Block
    from compressor.model.tape import Tape
    from compressor.progress import Progress
    from compressor.solvers.learned import Learned
    from compressor.spec import LinearPart
    from compressor.stages.streams import Streams

# The held-out sequences are measured so many times along the way.
_MEASURES = 10


def learn_block(
    tape: Tape,
    fed: Block,
    streams: Streams,
    started: Sequence[Started],
    weight: Callable[[LinearPart], torch.Tensor],
    fits: bool,
    progress: Progress,
) -> tuple[BlockError, dict[str, dict[str, torch.Tensor]]]:
    """Learns rounding and scales of a block's matrices together.

    Args:
        tape: of the calibration tokens.
        fed: the result's block as the start solvers stored it; left as it was, or with what was learned.
        streams: ``fed`` at the entrance of the block, ``exact`` behind it.
        started: the matrices; their solvers learn in one way.
        weight: what they are to be, [O, I].
        fits: whether there is memory for it; else it is skipped.
        progress: told of some steps.

    Returns:
        What it did, and module -> stored tensors; none where the start is to stay.
    """
    learned = _learning(started[0])
    weights = sum(start.part.out_features * start.part.in_features for start in started)
    skipped = None
    if not fits:
        skipped = f"that would take {LEARNED_BYTES * weights / 1e9:,.1f} GB"
    elif sum(streams.exact.get(batch).shape[0] for batch in range(len(streams))) < 2:
        skipped = "it takes two calibration sequences at least"
    if skipped is not None:
        return BlockError(fed.path, skipped=skipped), {}
    matrices = [_matrix(weight(start.part), start, learned) for start in started]
    parts = [start.part for start in started]
    training = BlockTraining(tape, fed, streams, list(zip(parts, matrices, strict=True)), learned)
    error = training.run(progress)
    if not error.is_better:
        return error, {}
    stored = zip(started, matrices, strict=True)
    return error, {start.part.module: start.tensors | matrix.tensors() for start, matrix in stored}


def _learning(start: Started) -> Learned:
    assert start.claim.solver is not None
    assert start.claim.solver.learning is not None
    return start.claim.solver.learning


def _matrix(weight_OI: torch.Tensor, start: Started, learned: Learned) -> LearnedMatrix:
    assert start.claim.scheme is not None
    return LearnedMatrix(weight_OI.float(), start.claim.scheme, start.tensors, scales=learned.scales)


class BlockTraining:
    """The training of one block.

    Args:
        tape: of the calibration tokens.
        block: the result's; its matrices are overwritten.
        streams: ``fed`` at the entrance of the block, ``exact`` behind it.
        matrices: what is learned, and where it lies in the block.
        learned: how.
    """

    def __init__(
        self,
        tape: Tape,
        block: Block,
        streams: Streams,
        matrices: Sequence[tuple[LinearPart, LearnedMatrix]],
        learned: Learned,
    ) -> None:
        assert streams.fed is not None
        self._tape, self._block = tape, block
        self._fed, self._exact = streams.fed, streams.exact
        self._matrices, self._learned = matrices, learned
        self._rows = [self._exact.get(batch).shape[0] for batch in range(len(streams))]
        held = held_out_rows(sum(self._rows))
        # Of every batch, the sequences before this one are trained on; the last of all are held out.
        left = sum(self._rows) - held
        self._trained: list[int] = []
        for rows in self._rows:
            self._trained.append(min(rows, max(left, 0)))
            left -= rows
        self._held_tokens = held * self._exact.get(0).shape[1]

    def run(self, progress: Progress) -> BlockError:
        """Trains; the matrices are then as they were at the best step, or at the start."""
        steps, rate = self._learned.steps, self._learned.first_rate
        batches = [batch for batch, rows in enumerate(self._trained) if rows]
        order = row_order(len(batches), steps, self._learned.seed + self._block.index).tolist()
        every = max(1, steps // _MEASURES)
        before = best = self._measure()
        for step, position in enumerate(order):
            self._step(batches[position], rate * (1 - step / steps))
            if (step + 1) % every == 0 or step + 1 == steps:
                error = self._measure()
                if isfinite(error) and error < best:
                    best = error
                    for _, matrix in self._matrices:
                        matrix.keep()
                note = f"{self._block.path}: step {step + 1} of {steps}, error {before:.3g} -> {best:.3g}"
                progress.advance(0, note=note)
        for _, matrix in self._matrices:
            matrix.go_back()
        self._put()
        return BlockError(self._block.path, before, best, self._held_tokens)

    def _step(self, batch: int, rate: float) -> None:
        parameters = list({id(p): p for p in map(self._parameter, self._matrices)}.values())
        self._put()
        error, norm = self._error(batch, slice(0, self._trained[batch]), gradients=True)
        with torch.enable_grad():
            loss = error / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = {id(p): gradient for p, gradient in zip(parameters, found, strict=True)}
        for part, matrix in self._matrices:
            gradient = gradients[id(self._block.parameter_of(part))]
            # an expert by itself that no token of the batch reached has none
            if gradient is not None:
                matrix.move(self._block.matrix_in(part, gradient), rate)

    def _parameter(self, member: tuple[LinearPart, LearnedMatrix]) -> torch.nn.Parameter:
        return self._block.parameter_of(member[0])

    def _put(self) -> None:
        for part, matrix in self._matrices:
            self._block.put(part, matrix.weight())

    def _measure(self) -> float:
        """The error on the held-out sequences."""
        self._put()
        sums = [
            self._error(batch, slice(self._trained[batch], rows), gradients=False)
            for batch, rows in enumerate(self._rows)
            if self._trained[batch] < rows
        ]
        norm = sum(float(norm) for _, norm in sums)
        return sum(float(error) for error, _ in sums) / norm if norm else float("nan")

    def _error(self, batch: int, rows: slice, *, gradients: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of some sequences' outputs and squared norm of the source's, fp32 scalars."""
        made_BTH = self._tape.run(self._block, self._fed, batch, gradients=gradients)
        assert made_BTH is not None, "nothing stops the pass"
        target_BTH = self._exact.get(batch)
        weight_BT = row_weights(target_BTH.flatten(0, 1)).view(target_BTH.shape[:2])[rows]
        target_BTH = target_BTH[rows].float()
        with torch.set_grad_enabled(gradients):
            error_BT = (made_BTH[rows].float() - target_BTH).square().sum(dim=-1)
            return (error_BT * weight_BT).sum(), (target_BTH.square().sum(dim=-1) * weight_BT).sum()
