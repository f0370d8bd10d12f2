"""What the user should know of a source before a run starts."""

from __future__ import annotations

from compressor.checkpoint.base import Source
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.planner.evaluated import UNMEASURED
from compressor.recipe.load import LoadedRecipe
from compressor.rope.checked import check_positions


def source_warnings(loaded: LoadedRecipe, source: Source, result_bytes: int) -> list[str]:
    """Warnings of a source as it was given; ``result_bytes``: of the result's tensors."""
    found = []
    if isinstance(source, DequantizedSource) and result_bytes > source.stored_bytes:
        found.append(
            f"the result would be larger than what the source stores: {result_bytes / 1e9:,.1f} GB of "
            f"tensors against {source.stored_bytes / 1e9:,.1f} GB"
        )
    found += [f"config.json of the source: {finding.what}" for finding in check_positions(source.config)]
    if loaded.recipe.evaluate is None:
        found.append(UNMEASURED)
    if source.revision and loaded.recipe.model.revision != source.revision:
        found.append(f"model.revision is not pinned; this run uses {source.revision}")
    return found
