"""The source as a result's ``kv_fold.tensors`` says that it was folded before its weights were stored.

A fold computes the same by construction, whoever wrote the file: orthogonal rotations and positive factors
that are undone next to where they are applied, in layers and shapes that the model has.
"""

from __future__ import annotations

from pathlib import Path

from compressor.checkpoint.base import Source
from compressor.checkpoint.folded import FOLD_NAME, FoldedSource, KvFold
from compressor.errors import CheckpointError
from compressor.verify.base import Check


def folded_source(checkpoint: Path, source: Source) -> tuple[Source, list[Check]]:
    """What the result's weights are to be compared with, and the check ``fold`` where there is one."""
    path = checkpoint / FOLD_NAME
    if not path.is_file() or path.is_symlink():
        return source, []
    try:
        fold = KvFold.read(checkpoint)
        folded = FoldedSource(source, fold)
    except CheckpointError as error:
        return source, [Check("fold", "failed", error.what)]
    text = (
        f"values of {len(fold.values)} layers rotated, keys of {len(fold.keys)} scaled: "
        f"{len(folded.changed)} tensors are compared with the folded source"
    )
    return folded, [Check("fold", "passed", text)]
