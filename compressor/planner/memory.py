"""How the blocks of a walk are held: whole, with the next one beside it or not, or without their experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.planner.sizes import computed_share, hidden_size, is_routed
from compressor.stages.base import Claim

# What multiplies a token of experts' inputs at once: as it comes, before and after its scaling.
_INPUT_COPIES = 3


@dataclass(frozen=True)
class Held:
    """What the walk holds of the blocks.

    Attributes:
        nbytes: at most.
        read_ahead: the next block is read while one is worked on.
        stored_experts: experts are read when they are computed with.
    """

    nbytes: int
    read_ahead: bool
    stored_experts: bool


def hold_blocks(
    blocks: Mapping[int, Sequence[Claim]], item_bytes: int, *, streams: int, free_bytes: float
) -> Held:
    """The fastest way that fits into ``free_bytes``, else the one that takes least.

    Args:
        blocks: claims of each.
        item_bytes: of the walk's dtype.
        streams: that pass; with two, a block is held twice, since matrices are replaced for one of them.
        free_bytes: what the blocks may take.
    """
    whole = item_bytes * max((_numel(members) for members in blocks.values()), default=0)
    ways = [Held((streams + 1) * whole, True, False), Held(streams * whole, False, False)]
    routed = {
        index: [claim for claim in members if is_routed(claim.tensor.name)]
        for index, members in blocks.items()
    }
    if streams == 1 and any(routed.values()):
        dense = item_bytes * max(_numel(members) - _numel(routed[index]) for index, members in blocks.items())
        experts = [claim for members in routed.values() for claim in members]
        ways.append(Held(2 * dense + max(_read_bytes(claim, item_bytes) for claim in experts), True, True))
    fitting = (way for way in ways if way.nbytes <= free_bytes)
    return next(fitting, min(ways, key=lambda way: way.nbytes))


def activation_bytes(
    claims: Sequence[Claim], tokens: int, item_bytes: int, config: dict[str, Any], *, stored: bool
) -> int:
    """What experts in one module take to compute so many tokens: their inputs, products and outputs.

    Stored experts' products are made one by one.
    """
    parts = [part for claim in claims if is_routed(claim.tensor.name) for part in claim.role.parts]
    if not parts:
        return 0
    experts = len(
        {part.expert if part.expert is not None else part.module.rpartition(".")[0] for part in parts}
    )
    rows = tokens * max(1.0, experts * computed_share(config))
    hidden = hidden_size(config)
    wide = max(max(part.in_features, part.out_features) for part in parts)
    inner = max((part.in_features for part in parts if part.in_features != hidden), default=wide)
    # The product of gate and up, the gate's activation, and what both make.
    products = inner if stored else 4 * inner
    return int(item_bytes * rows * (_INPUT_COPIES * hidden + products))


def _numel(claims: Sequence[Claim]) -> int:
    return sum(claim.tensor.numel for claim in claims)


def _read_bytes(claim: Claim, item_bytes: int) -> int:
    """An expert as it is read, and in the walk's dtype."""
    count = claim.tensor.shape[0] if claim.role.parts and claim.role.parts[0].expert is not None else 1
    return claim.tensor.nbytes // count + item_bytes * claim.tensor.numel // count
