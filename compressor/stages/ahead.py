"""Kernels compiled before they are needed: a walk's solvers try themselves on one small matrix.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from compressor.device import pick_device
from compressor.stages.base import Claim, needs_moments

if TYPE_CHECKING:
    import torch

# Multiples of all groups and blocks.
ROWS, COLUMNS = 128, 256


def compile_ahead(claims: Iterable[Claim]) -> None:
    """Has the kernels that solving ``claims`` calls compiled in another thread, on an accelerator.

    Which variants compile depends on grids and groups, hardly on shapes. No result depends on it.
    """
    device = pick_device()
    if device.type != "cpu":
        from compressor import kernels

        claims = tuple(claims)
        kernels.compile_ahead(lambda: solve_small(claims, device))


def solve_small(claims: Iterable[Claim], device: torch.device) -> None:
    """Solves one small matrix for each scheme and solver of claims that need moments; errors are let be."""
    import torch

    from compressor.solvers.statistics import Moments

    weight_OI = torch.arange(ROWS * COLUMNS, device=device).view(ROWS, COLUMNS).sin()
    moments = Moments(torch.eye(COLUMNS, device=device), None, COLUMNS)
    tried = []
    for claim in claims:
        scheme, solver = claim.scheme, claim.solver
        if scheme is None or solver is None or not needs_moments(claim) or (scheme, solver) in tried:
            continue
        tried.append((scheme, solver))
        with suppress(Exception):
            solver.solve_heard([weight_OI], scheme, moments)
