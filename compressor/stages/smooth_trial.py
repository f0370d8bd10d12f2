"""What solver ``smooth`` measures: an input on the calibration tokens, and the errors of its readers.

Legend: R sampled rows, N rows of a batch, O out_features, I in_features, K free scales of a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.model.foldings import Fold
from compressor.numerics.input_ranges import RangeSums
from compressor.numerics.row_weights import row_weights
from compressor.schemes.base import Scheme, Search
from compressor.solvers.measure import inner
from compressor.solvers.smooth import MOST_EXPERTS, ROWS
from compressor.stages.jobs import Job

if TYPE_CHECKING:
    from compressor.model.blocks import Block
    from compressor.model.hidden import HiddenStates
    from compressor.model.tape import Tape

_EXPERTS = ".experts."
_TINY = 1e-12


@dataclass
class HeardInput:
    """What a fold's input was: sums over all rows, and a sample of them.

    Attributes:
        size_I: fp64, mean magnitude of each channel, rows of outlying inputs weighted down.
        peak_I: fp32, the largest.
        rows: how many.
        x: sampled rows, a batch each.
        weight: what each of them counts, root of a share.
    """

    size_I: torch.Tensor
    peak_I: torch.Tensor
    rows: int = 0
    x: list[torch.Tensor] = field(default_factory=list)
    weight: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, channels: int, device: torch.device) -> HeardInput:
        """Before anything was heard."""
        return cls(
            torch.zeros(channels, dtype=torch.float64, device=device), torch.zeros(channels, device=device)
        )

    def add(self, x_NI: torch.Tensor, most: int) -> None:
        """Adds a batch, and at most ``most`` of its rows to the sample."""
        x_NI = x_NI.float()
        root_N = row_weights(x_NI).sqrt_()
        weighted_NI = x_NI.abs() * root_N[:, None]
        self.size_I += weighted_NI.sum(dim=0)
        self.peak_I = torch.maximum(self.peak_I, weighted_NI.amax(dim=0))
        self.rows += len(x_NI)
        stride = -(-len(x_NI) // most)
        self.x.append(x_NI[::stride].clone())
        self.weight.append(root_N[::stride].clone())


def hear(
    tape: Tape, block: Block, folds: Sequence[Fold], states: HiddenStates, batches: int
) -> list[HeardInput]:
    """What the folds' inputs are, in one pass of all batches of the source's stream."""
    device = tape.small_hidden.device
    most = max(ROWS // batches, 1)
    heard, handles = [], []
    for fold in folds:
        sums = HeardInput.of(fold.channels, device)
        heard.append(sums)
        module = block.module.get_submodule(fold.ear)

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sums: HeardInput = sums
        ) -> None:
            sums.add(next(iter((*args, *kwargs.values()))).flatten(0, -2), most)

        def after(_: nn.Module, _args: Any, made: torch.Tensor, sums: HeardInput = sums) -> None:
            sums.add(made.flatten(0, -2), most)

        if fold.norm is None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    try:
        for batch in range(batches):
            tape.run(block, states, batch)
    finally:
        for handle in handles:
            handle.remove()
    return heard


class Trial:
    """Quantizes a fold's readers with scales folded in, and measures how wrong their outputs are."""

    def __init__(
        self,
        fold: Fold,
        jobs: Sequence[Job],
        block: Block,
        x_RI: torch.Tensor,
        weight_R: torch.Tensor,
        importance_I: torch.Tensor | None,
    ) -> None:
        self._fold, self._jobs, self._block = fold, jobs, block
        self._x_RI, self._root_R1, self._importance_I = x_RI, weight_R[:, None], importance_I
        # Module -> the output of the real weights, and its square.
        self._wanted: dict[str, tuple[torch.Tensor, float]] = {}

    def weight_sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64 [I] each: mean magnitude of each column, every matrix counting alike; the largest."""
        parts = [part for job in self._jobs for _, part in job]
        mean_I = torch.zeros(self._fold.channels, dtype=torch.float64, device=self._x_RI.device)
        largest_I = mean_I.clone()
        for part in parts:
            size_OI = self._block.weight(part).float().abs()
            column_I = size_OI.mean(dim=0).double()
            mean_I += column_I / column_I.mean().clamp(min=_TINY)
            largest_I = torch.maximum(largest_I, size_OI.amax(dim=0).double())
        return mean_I, largest_I

    def errors(self, scale_K: torch.Tensor, search: Search) -> dict[str, float]:
        """Module -> squared error of its output over the output's square."""
        scale_I = self._fold.expand(scale_K)
        fed_RI = self._x_RI / scale_I
        importance_I = self._importance_I
        if importance_I is not None:
            importance_I = importance_I / scale_I.square()
        rounded: dict[object, torch.Tensor] = {}
        found: dict[str, float] = {}
        for job in self._jobs:
            scheme = job[0][0].scheme
            assert scheme is not None
            if scheme not in rounded:
                rounded[scheme] = _as_engines_round(fed_RI, scheme)
            exact = [self._block.weight(part).float() for _, part in job]
            scaled = [weight_OI * scale_I for weight_OI in exact]
            fitted = scheme.fit(scaled, search=search, importance_I=importance_I)
            for (_, part), weight_OI, scaled_OI, scales in zip(job, exact, scaled, fitted, strict=True):
                tensors = scheme.encode(scaled_OI, scales)
                decoded_OI = scheme.decode(tensors, *scaled_OI.shape)
                wanted_RO, energy = self._output(part.module, weight_OI)
                miss_RO = (rounded[scheme] @ decoded_OI.T).mul_(self._root_R1).sub_(wanted_RO)
                found[part.module] = inner(miss_RO, miss_RO) / energy if energy > 0 else 0.0
        return found

    def _output(self, module: str, weight_OI: torch.Tensor) -> tuple[torch.Tensor, float]:
        if module not in self._wanted:
            wanted_RO = (self._x_RI @ weight_OI.T).mul_(self._root_R1)
            self._wanted[module] = wanted_RO, inner(wanted_RO, wanted_RO)
        return self._wanted[module]


def some_experts(jobs: Sequence[Job]) -> list[Job]:
    """Of experts' jobs a few; of all others every one."""
    routed = [job for job in jobs if _EXPERTS in job[0][1].module]
    if len(routed) <= MOST_EXPERTS:
        return list(jobs)
    kept = {id(routed[index * len(routed) // MOST_EXPERTS]) for index in range(MOST_EXPERTS)}
    return [job for job in jobs if id(job) in kept or _EXPERTS not in job[0][1].module]


def _as_engines_round(x_RI: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What the scheme has engines make of the rows, with a range measured on these."""
    if not scheme.rounds_inputs:
        return x_RI
    tensors: dict[str, torch.Tensor] = {}
    if scheme.static_inputs:
        sums = RangeSums(x_RI.shape[1], x_RI.device)
        sums.add(x_RI)
        tensors = scheme.input_tensors(sums.result())
    return scheme.round_inputs(x_RI, tensors)
