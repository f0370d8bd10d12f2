"""The ranges of a block's inputs on the source's stream, and what schemes store of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compressor.errors import CheckpointError
from compressor.spec import LinearPart
from compressor.stages.base import Claim, needs_range

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Block, Site
    from compressor.numerics.input_ranges import InputRange


class InputScales:
    """Gathers the ranges in one pass; then makes what is stored of them.

    Attributes:
        needed: whether any matrix asks for a range.

    Args:
        block: with the matrices.
        by_module: those that are quantized.
        device: where the inputs are.
    """

    def __init__(
        self, block: Block, by_module: Mapping[str, tuple[Claim, LinearPart]], device: torch.device
    ) -> None:
        from compressor.numerics.input_ranges import RangeSums

        self._steps = block.steps
        self._site_of = {part.module: site for step in block.steps for site in step for part in site.parts}
        self._sums = {
            site.name: RangeSums(site.in_features, device)
            for module, site in self._site_of.items()
            if module in by_module and needs_range(by_module[module][0])
        }
        self.needed = bool(self._sums)
        self._ranges: dict[str, InputRange] = {}
        # By module: making them takes milliseconds, and every batch asks for them.
        self._made: dict[str, dict[str, torch.Tensor]] = {}

    def hear(self, site: Site, x_NI: torch.Tensor) -> None:
        """Told of every site of every batch."""
        if site.name in self._sums:
            self._sums[site.name].add(x_NI)

    def finish(self) -> None:
        """After the last batch."""
        for step in self._steps:
            heard = {site: self._sums[site.name].result() for site in step if site.name in self._sums}
            self._ranges |= shared_ranges(heard)
        self._sums = {}

    def is_shared(self, experts: str) -> bool:
        """Whether the experts of a module, by its path, have a range in common."""
        return any(name.startswith(f"{experts}.") for name in self._ranges)

    def of(self, claim: Claim, part: LinearPart) -> dict[str, torch.Tensor]:
        """What the scheme stores of the range of a matrix's inputs.

        Raises:
            CheckpointError: the range is none that a model's inputs can have.
        """
        assert claim.scheme is not None
        if not claim.scheme.static_inputs:
            return {}
        if part.module not in self._made:
            heard = self._ranges[self._site_of[part.module].name]
            try:
                self._made[part.module] = claim.scheme.input_tensors(heard)
            except CheckpointError as error:
                raise CheckpointError(error.what, where=part.module, fix=error.fix) from error
        return self._made[part.module]


def shared_ranges(ranges: Mapping[Site, InputRange]) -> dict[str, InputRange]:
    """The ranges of one step's sites by name; engines have one for all experts of a layer.

    So an expert that heard little or nothing has its siblings'.
    """
    merged: dict[int, InputRange] = {}
    for site, heard in ranges.items():
        if site.routed:
            known = merged.get(site.in_features)
            merged[site.in_features] = heard if known is None else known.merge(heard)
    return {site.name: merged[site.in_features] if site.routed else heard for site, heard in ranges.items()}
