"""Recipes that would learn one block in two ways, or nothing at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from compressor.calibration.spec import CalibrationSpec
from compressor.errors import UserError
from compressor.model.families import block_index
from compressor.stages.base import Claim


def learned_twice(claims: Sequence[Claim]) -> list[UserError]:
    """A fault where rules have the matrices of one block learned with different options."""
    blocks: dict[int, dict[str, Claim]] = defaultdict(dict)
    for claim in claims:
        index = block_index(claim.tensor.name)
        learned = claim.solver.learning if claim.solver is not None else None
        if index is not None and learned is not None:
            blocks[index].setdefault(learned.model_dump_json(exclude={"start", "kind"}), claim)
    for index, by_options in blocks.items():
        if len(by_options) > 1:
            (options, claim), (others, other), *_ = by_options.items()
            return [
                UserError(
                    f"the matrices of a block are learned together, those of block {index} with two sets of "
                    f"options: {claim.tensor.name} with {options}, {other.tensor.name} with {others}",
                    where=other.rule,
                    fix="give solver learned the same options in all rules; only 'start' may differ",
                )
            ]
    return []


def learned_on_one_row(claims: Sequence[Claim], calibration: CalibrationSpec) -> list[UserError]:
    """A fault where something is to be learned and no calibration sequence is left to hold out."""
    learned = any(claim.solver is not None and claim.solver.learning is not None for claim in claims)
    if not learned or calibration.num_samples > 1:
        return []
    return [
        UserError(
            "solver learned holds calibration sequences out to tell whether a block got better, and there is "
            "only one",
            where="calibration.num_samples",
            fix="set it to 2 at least; 8 and more leave most of the text to learn from",
        )
    ]
