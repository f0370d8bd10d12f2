"""Whether a block still computes the same once its keys and values were changed by a fold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.checkpoint.folded import FoldedSource, KvFold
from compressor.errors import CheckpointError
from compressor.progress import Progress

if TYPE_CHECKING:
    import torch

# How far the block's output may be from the one before, over what the block adds to its input: fp32 sums in
# another order. A wrong fold is off by about 1.
TOLERANCE = 1e-3
# Sequences and tokens of random states that are passed.
_SMALL = (2, 16)
_SEED = 20
_IDS = 32  # every vocabulary has more


def sound_fold(source: Source, fold: KvFold, progress: Progress) -> KvFold:
    """What of the fold leaves the first block that it changes computing the same in fp32; warns of the rest.

    Two blocks are in memory at once.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    kept = fold
    if fold.values and not _same(source, KvFold(fold.values), progress):
        progress.warn("values are not rotated: a block of this model computes otherwise then")
        kept = replace(kept, values=())
    if fold.keys and not _same(source, KvFold(keys=fold.keys), progress):
        progress.warn("keys are not scaled: a block of this model computes otherwise then")
        kept = replace(kept, keys={})
    return kept


def _same(source: Source, fold: KvFold, progress: Progress) -> bool:
    """Whether the first block that is changed computes in fp32 what it did before."""
    layer = min([*fold.values, *fold.keys])
    try:
        before, hidden = _outputs(source, layer)
        after, _ = _outputs(FoldedSource(source, fold, exact=True), layer)
    except CheckpointError as error:
        progress.warn(f"the fold cannot be tried: {error.what}")
        return False
    added = float((before - hidden).norm())
    return float((after - before).norm()) <= TOLERANCE * added


def _outputs(source: Source, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's output for random states, and these."""
    import torch

    from compressor.model.hidden import HiddenStates
    from compressor.model.tape import Tape

    generator = torch.Generator().manual_seed(_SEED)
    cpu = torch.device("cpu")
    with torch.no_grad():
        ids_BT = torch.randint(0, _IDS, _SMALL, generator=generator)
        tape = Tape.record(
            source, [], dtype=torch.float32, device=cpu, states=HiddenStates(cpu), small=ids_BT
        )
        hidden = torch.randn(tape.small_hidden.shape, generator=generator)
        return tape.rehearse(tape.place(tape.load(layer)), hidden), hidden
