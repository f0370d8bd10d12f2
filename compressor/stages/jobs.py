"""Which matrices of a block are heard together and solved together: that share a scale, that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import TYPE_CHECKING

from compressor.spec import LinearPart, TensorHeader
from compressor.stages.base import Claim

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Site
    from compressor.solvers.statistics import Moments

# Matrices that share a tensor-level scale, with their claims.
Job = tuple[tuple[Claim, LinearPart], ...]
# A job and what was measured of its input, where its solver asks for that.
HeardJob = tuple[Job, "Moments | None"]


def scale_groups(matrices: Iterable[tuple[Claim, LinearPart]]) -> list[Job]:
    """Quantized matrices in order, those that share a tensor-level scale together."""
    grouped: dict[str, list[tuple[Claim, LinearPart]]] = {}
    for claim, part in matrices:
        assert claim.scheme is not None
        shared = part.fuse_group if claim.scheme.shares_tensor_scale else None
        grouped.setdefault(shared or part.module, []).append((claim, part))
    return [tuple(group) for group in grouped.values()]


def stored_tensors(matrices: Iterable[tuple[Claim, LinearPart]]) -> list[TensorHeader]:
    """What the schemes of the matrices store, in order."""
    return [
        output
        for claim, part in matrices
        if claim.scheme is not None
        for output in claim.scheme.outputs(
            part.module, part.out_features, part.in_features, dtype=claim.tensor.dtype
        )
    ]


def heard_jobs(jobs: Sequence[Job], moments: Moments | None) -> list[HeardJob]:
    """The jobs of one site, each with what the site's moments say of its rows; jobs and rows in order."""
    heard: list[HeardJob] = []
    first = 0
    for job in jobs:
        rows = slice(first, first + sum(part.out_features for _, part in job))
        heard.append((job, None if moments is None else moments.of_rows(rows)))
        first = rows.stop
    return heard


def stacked(jobs: Sequence[Job], weight: Callable[[LinearPart], torch.Tensor]) -> torch.Tensor | None:
    """The matrices of a site, rows as ``heard_jobs`` has them; None where they are no fewer than columns."""
    import torch

    parts = [part for job in jobs for _, part in job]
    if sum(part.out_features for part in parts) >= parts[0].in_features:
        return None
    return weight(parts[0]) if len(parts) == 1 else torch.cat([weight(part) for part in parts])


def alike(jobs: Sequence[HeardJob]) -> list[list[HeardJob]]:
    """Jobs that may be solved at once: of one scheme, solver and shape; without moments each alone."""
    grouped: dict[object, list[HeardJob]] = {}
    for job, moments in jobs:
        claim = job[0][0]
        shapes = tuple((part.out_features, part.in_features) for _, part in job)
        alone = job[0][1].module if moments is None else ""
        key = (claim.scheme, claim.solver, claim.role.input_norm, shapes, alone)
        grouped.setdefault(key, []).append((job, moments))
    return list(grouped.values())


def source_bytes(jobs: Sequence[HeardJob]) -> int:
    """What the jobs' matrices take in the source."""
    matrices = [matrix for job, _ in jobs for matrix in job]
    return sum(
        part.out_features * part.in_features * (claim.tensor.nbytes // claim.tensor.numel)
        for claim, part in matrices
    )


def heard_together(step: Iterable[Site], modules: Set[str], most_bytes: int) -> Iterator[list[Site]]:
    """The sites of a step with some of ``modules``, as many at a time as ``most_bytes`` of sums allow."""
    chosen: list[Site] = []
    used = 0
    for site in step:
        if not any(part.module in modules for part in site.parts):
            continue
        # One fp32 sum and at most half as much of rows on offer; or two sums.
        needed = site.in_features**2 * (5 if site.routed else 8)
        if chosen and used + needed > most_bytes:
            yield chosen
            chosen, used = [], 0
        chosen.append(site)
        used += needed
    if chosen:
        yield chosen
