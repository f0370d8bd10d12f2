"""What views say of blocks whose matrices were learned together."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.report.calibration import LearnedBlock
from compressor.report.words import number, percent


def learned_note(blocks: Sequence[LearnedBlock]) -> str:
    """Block reconstruction error before and after, and which blocks were left alone."""
    measured = [block for block in blocks if block.before is not None and block.after is not None]
    text = "Learned: rounding and scales of all matrices of a block together"
    if measured:
        before = sum(block.before or 0.0 for block in measured) / len(measured)
        after = sum(block.after or 0.0 for block in measured) / len(measured)
        better = sum(block.before != block.after for block in measured)
        change = f" ({percent(after / before - 1, signed=True)})" if before else ""
        text += (
            f"; better than before in {better:,} of {len(measured):,} blocks. Block reconstruction error, "
            f"mean over blocks, on {measured[0].tokens:,} calibration tokens that were not trained on: "
            f"{number(before, 5)} before, {number(after, 5)} after{change}, at the best of the steps "
            "measured there. The output errors of single matrices are those before"
        )
    skipped = [block for block in blocks if block.skipped is not None]
    if skipped:
        text += f"; not done in {len(skipped):,} of {len(blocks):,} blocks, since {skipped[0].skipped}"
    return f"{text}."
