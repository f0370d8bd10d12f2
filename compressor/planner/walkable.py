"""Whether a model can be walked block by block, as far as config and headers tell.

The rest takes transformers, which takes seconds to import: whether it knows the model, finds all parameters,
and calls its blocks one after the other. That is checked by ``model.tape.check_walkable``, which a run does
before anything else (``runner``), also from headers alone; a plan, which must be instant, does without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from compressor.errors import UserError
from compressor.model.families import block_index, text_config
from compressor.stages.base import Claim

_FIX = "download it again, or correct config.json"


def walk_faults(claims: Sequence[Claim], config: dict[str, Any], label: str) -> list[UserError]:
    """Why the model cannot be walked; ``label`` names the source."""
    if not isinstance(config.get("model_type"), str):
        what = "config.json names no model_type, so nobody knows how the model computes"
        return [UserError(what, where=label, fix="use a checkpoint of a model that transformers knows")]
    blocks = decoder_blocks(claims)
    if not blocks:
        what = "none of its matrices lie in repeated blocks, so it cannot be calibrated block by block"
        return [UserError(what, where=label, fix="use a solver and a scheme that need no data")]
    stated = text_config(config).get("num_hidden_layers")
    count = stated if type(stated) is int else max(blocks) + 1
    # No longer than what there is: the config may say anything.
    missing = next((index for index in range(len(blocks) + 1) if index not in blocks), 0)
    if missing >= count:
        return []
    what = f"there are {count} blocks, but block {missing} has no tensors: it cannot be calibrated"
    return [UserError(what, where=label, fix=_FIX)]


def decoder_blocks(claims: Sequence[Claim]) -> dict[int, list[Claim]]:
    """The decoder's blocks by number: of the list of blocks that holds the most linear matrices."""
    placed = [(claim, found) for claim in claims if (found := _placed(claim.tensor.name)) is not None]
    sizes = Counter[str]()
    for claim, (path, _) in placed:
        sizes[path] += claim.tensor.numel if claim.role.kind == "linear" else 0
    if not any(sizes.values()):
        return {}
    (decoder, _), *_ = sizes.most_common(1)
    blocks: dict[int, list[Claim]] = {}
    for claim, (path, index) in placed:
        if path == decoder:
            blocks.setdefault(index, []).append(claim)
    return blocks


def _placed(name: str) -> tuple[str, int] | None:
    """The path of the list of blocks that a tensor lies in, and the number of its block."""
    index = block_index(name)
    return None if index is None else (name.partition(f".{index}.")[0], index)
