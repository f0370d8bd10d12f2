"""Whether a block still computes the same on calibration tokens, with chosen scales folded in.

Folds are found on a few random rows (``model/foldings.py``), whose values may be too small for what lies
between what makes an input and what reads it: OLMo, for one, may clamp values at ``clip_qkv``.

Legend: N rows of a batch, H hidden size, K free scales of a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from compressor.model.foldings import Fold, apply, kept, tolerance
from compressor.numerics.row_weights import row_weights

if TYPE_CHECKING:
    from compressor.model.blocks import Block
    from compressor.model.hidden import HiddenStates
    from compressor.model.tape import Tape

Chosen = Sequence[tuple[Fold, torch.Tensor]]


def sound(
    tape: Tape, block: Block, states: HiddenStates, batches: int, chosen: Chosen
) -> list[tuple[Fold, torch.Tensor]]:
    """Those of the folds and their scales with which the block computes what it did before.

    The block is as before afterwards. Two passes of two batches where all are sound.

    Args:
        tape: of the calibration tokens.
        block: without any of the folds.
        states: at its entrance.
        batches: how many there are.
        chosen: folds with their scales, [K] each.
    """
    if not chosen or _same(tape, block, states, batches, chosen):
        return list(chosen)
    found: list[tuple[Fold, torch.Tensor]] = []
    for pair in chosen:
        if _same(tape, block, states, batches, [*found, pair]):
            found.append(pair)
    return found


def _same(tape: Tape, block: Block, states: HiddenStates, batches: int, chosen: Chosen) -> bool:
    limit = tolerance([fold for fold, _ in chosen], tape.small_hidden.dtype)
    error, norm = 0.0, 0.0
    names = {spot.parameter for fold, _ in chosen for spot in fold.spots}
    for batch in sorted({0, batches // 2}):
        before = tape.run(block, states, batch)
        with kept(block, names):
            for fold, scale_K in chosen:
                apply(block, fold, _beyond(fold, scale_K))
            after = tape.run(block, states, batch)
        assert before is not None, "nothing stops the pass"
        assert after is not None, "nothing stops the pass"
        added_NH = (before - states.get(batch)).flatten(0, -2).float()
        miss_NH = (after - before).flatten(0, -2).float()
        weight_N = row_weights(added_NH)
        error += float((miss_NH.square().sum(dim=1) * weight_N).sum())
        norm += float((added_NH.square().sum(dim=1) * weight_N).sum())
    return error <= limit**2 * norm  # NaN compares false


def _beyond(fold: Fold, scale_K: torch.Tensor) -> torch.Tensor:
    """Powers of two, no nearer to one than the scales: they round nothing, so that a small miss tells.

    Where a norm adds 1 to its weight, the scales as they are: what it rounds to is exact for these alone.
    """
    if fold.offset:
        return scale_K
    exponent_K = scale_K.log2()
    return torch.exp2(exponent_K.sign() * exponent_K.abs().ceil())
