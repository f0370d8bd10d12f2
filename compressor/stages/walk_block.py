"""One block of the walk: hears the inputs of its matrices, solves them, and passes the states on.

Legend: O out_features, I in_features, N tokens that reach a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import CheckpointError
from compressor.progress import Progress
from compressor.stages.base import Claim, needs_moments, needs_range
from compressor.stages.importance import norm_importance
from compressor.stages.receipts import PartError
from compressor.stages.streams import Streams
from compressor.stages.walked import WalkedTensors

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Block, Site
    from compressor.model.hidden import HiddenStates
    from compressor.model.tape import Hear, Tape
    from compressor.numerics.input_ranges import InputRange
    from compressor.solvers.statistics import Moments
    from compressor.spec import LinearPart

_Job = tuple[tuple["Claim", "LinearPart"], ...]
_Heard = tuple[_Job, "Moments | None"]
_SHOWN = 3


class BlockWalk:
    """The work on one block.

    Args:
        source: the checkpoint.
        tape: of the calibration tokens.
        block: with the source's weights.
        claims: its quantized tensors.
        streams: the streams at the entrance of the block.
        moment_bytes: most bytes of statistics gathered in one pass.
        keep_inputs: keep what the source's stream feeds the matrices of this block, instead of computing it
            again for every step.
    """

    def __init__(
        self,
        source: Source,
        tape: Tape,
        block: Block,
        claims: Sequence[Claim],
        streams: Streams,
        moment_bytes: int,
        keep_inputs: bool,
    ) -> None:
        self._source, self._tape, self._streams = source, tape, streams
        self._exact = block
        self._fed = block.twin() if streams.fed is not None else None
        self._by_module = {part.module: (claim, part) for claim in claims for part in claim.role.parts}
        self._moment_bytes = moment_bytes
        self._keep_inputs = keep_inputs
        # Site name -> the source stream's inputs of each batch, once that stream has passed the block.
        self._inputs: dict[str, list[torch.Tensor]] | None = None
        self._ranges: dict[str, InputRange] = {}
        self._site_of = {part.module: site for step in block.steps for site in step for part in site.parts}
        # By module: making them takes milliseconds, and every batch asks for them.
        self._of_inputs: dict[str, dict[str, torch.Tensor]] = {}

    def put_finished(self, walked: WalkedTensors) -> None:
        """Takes the block's quantized weights from what an interrupted run finished."""
        for claim, part in self._by_module.values():
            self._put(claim, part, walked.local(part.module))

    def solve(self, path: Path, progress: Progress, note: str) -> list[PartError]:
        """Solves every claimed matrix and writes the block's file; returns their errors.

        Raises:
            CheckpointError: a weight is not finite.
            UserError: the disk is full.
        """
        errors: list[PartError] = []
        outputs = [
            output
            for claim, part in self._by_module.values()
            if claim.scheme is not None
            for output in claim.scheme.outputs(
                part.module, part.out_features, part.in_features, dtype=claim.tensor.dtype
            )
        ]
        self._pass_exact()
        with ShardWriter(path, outputs) as writer:
            for number, step in enumerate(self._exact.steps):
                for sites in self._passes(step):
                    moments = self._hear(number, sites)
                    jobs = [(job, moments.get(site.name)) for site in sites for job in self._jobs(site)]
                    for batch in _alike(jobs):
                        errors += self._solve_jobs(batch, writer)
                        parts = [part for job, _ in batch for _, part in job]
                        size = sum(part.out_features * part.in_features for part in parts)
                        progress.advance(size * _item_bytes(batch[0][0][0][0]), note=note)
        return errors

    def advance(self) -> None:
        """Both streams pass the block: the source's with its weights, the result's with the stored ones."""
        passing = [(self._fed, self._streams.fed)]
        if self._inputs is None:
            passing.append((self._exact, self._streams.exact))
        for block, states in passing:
            if block is None or states is None:
                continue
            for batch in range(len(self._streams)):
                states.put(batch, self._through(block, states, batch))

    def _through(
        self, block: Block, states: HiddenStates, batch: int, hear: Hear | None = None
    ) -> torch.Tensor:
        output = self._tape.run(block, states, batch, hear=hear)
        assert output is not None, "nothing stops the pass"
        return output

    def _pass_exact(self) -> None:
        """One pass of the source's stream, for the ranges of inputs and for inputs that are kept."""
        from compressor.numerics.input_ranges import RangeSums

        sites = [site for step in self._exact.steps for site in step]
        paired = {site.name for site in sites if self._keep_inputs and self._is_paired(site)}
        sums = {
            site.name: RangeSums(site.in_features, self._streams.device)
            for site in sites
            if self._is_ranged(site)
        }
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in paired}
        moves = self._keep_inputs or self._fed is None
        if not (moves or sums):
            return

        def hear(site: Site, x_NI: torch.Tensor, tokens_N: torch.Tensor | None) -> None:
            if site.name in sums:
                sums[site.name].add(x_NI)
            if site.name in paired:
                inputs[site.name].append(x_NI.clone())

        for batch in range(len(self._streams)):
            output = self._through(self._exact, self._streams.exact, batch, hear)
            if moves:
                self._streams.exact.put(batch, output)
        if moves:
            self._inputs = inputs
        for step in self._exact.steps:
            self._ranges |= _shared({site: sums[site.name].result() for site in step if site.name in sums})

    def _is_heard(self, site: Site) -> bool:
        return any(needs_moments(job[0][0]) for job in self._jobs(site))

    def _is_ranged(self, site: Site) -> bool:
        return any(needs_range(job[0][0]) for job in self._jobs(site))

    def _is_paired(self, site: Site) -> bool:
        """Whether both streams hear the same tokens there: experts may be given others by either."""
        return not site.routed and self._is_heard(site)

    def _passes(self, step: Sequence[Site]) -> Iterator[list[Site]]:
        """The sites of a step with something to solve, as many at a time as the statistics' budget holds."""
        chosen: list[Site] = []
        used = 0
        for site in step:
            if not any(part.module in self._by_module for part in site.parts):
                continue
            needed = 4 * site.in_features**2 * (1 if site.routed else 2)
            if chosen and used + needed > self._moment_bytes:
                yield chosen
                chosen, used = [], 0
            chosen.append(site)
            used += needed
        if chosen:
            yield chosen

    def _hear(self, step: int, sites: Sequence[Site]) -> dict[str, Moments]:
        """Moments of the inputs of ``sites``, with cross moments where both streams hear the same tokens."""
        from compressor.solvers.statistics import MomentSums

        heard = [site for site in sites if self._is_heard(site)]
        if not heard:
            return {}
        assert self._fed is not None
        assert self._streams.fed is not None
        device = self._streams.device
        sums = {site.name: MomentSums(site.in_features, device, not site.routed) for site in heard}
        paired = {site.name for site in heard if not site.routed}
        exact: dict[str, torch.Tensor] = {}

        def keep(site: Site, x_NI: torch.Tensor, tokens_N: torch.Tensor | None) -> None:
            if site.name in paired:
                exact[site.name] = x_NI

        def add(site: Site, x_NI: torch.Tensor, tokens_N: torch.Tensor | None) -> None:
            if site.name in sums:
                sums[site.name].add(self._rounded(site, x_NI), exact.pop(site.name, None))

        for batch in range(len(self._streams)):
            if self._inputs is not None:
                exact.update({name: self._inputs[name][batch] for name in paired})
            elif paired:
                self._tape.run(self._exact, self._streams.exact, batch, hear=keep, until=step)
            self._tape.run(self._fed, self._streams.fed, batch, hear=add, until=step)
        return {name: total.result() for name, total in sums.items()}

    def _jobs(self, site: Site) -> list[_Job]:
        """The claimed matrices of a site, those that share a tensor-level scale together."""
        grouped: dict[str, list[tuple[Claim, LinearPart]]] = {}
        for heard in site.parts:
            if heard.module not in self._by_module:
                continue
            claim, part = self._by_module[heard.module]
            assert claim.scheme is not None
            shared = part.fuse_group if claim.scheme.shares_tensor_scale else None
            grouped.setdefault(shared or part.module, []).append((claim, part))
        return [tuple(job) for job in grouped.values()]

    def _solve_jobs(self, batch: Sequence[_Heard], writer: ShardWriter) -> list[PartError]:
        """Solves jobs of one scheme and solver, each with moments of its own."""
        claim, first = batch[0][0][0]
        scheme, solver = claim.scheme, claim.solver
        assert scheme is not None
        assert solver is not None
        groups = [([self._exact.weight(part).float() for _, part in job], moments) for job, moments in batch]
        try:
            importance_I = norm_importance(self._source, claim.role.input_norm, first.in_features)
            if importance_I is not None:
                importance_I = importance_I.to(self._streams.device)
            heard = [(weights_OI, moments) for weights_OI, moments in groups if moments is not None]
            if heard:
                solved = solver.solve_groups(heard, scheme, importance_I)
            else:
                solved = [solver.solve(weights_OI, scheme, importance_I) for weights_OI, _ in groups]
        except CheckpointError as error:
            names = ", ".join(part.module for job, _ in batch[:_SHOWN] for _, part in job)
            raise CheckpointError(error.what, where=names, fix=error.fix) from error
        errors = []
        for (job, moments), results in zip(batch, solved, strict=True):
            for (claim, part), result in zip(job, results, strict=True):
                tensors = result.tensors | self._input_tensors(claim, part)
                for local, tensor in tensors.items():
                    writer.write(f"{part.module}.{local}", tensor)
                self._put(claim, part, tensors)
                errors.append(PartError.of(part, scheme, result, None if moments is None else moments.rows))
        return errors

    def _rounded(self, site: Site, x_NI: torch.Tensor) -> torch.Tensor:
        """Inputs as an engine rounds them before it multiplies."""
        claim, part = self._jobs(site)[0][0]
        assert claim.scheme is not None
        if not claim.scheme.rounds_inputs:
            return x_NI
        return claim.scheme.round_inputs(x_NI, self._input_tensors(claim, part))

    def _input_tensors(self, claim: Claim, part: LinearPart) -> dict[str, torch.Tensor]:
        """What the scheme stores of the range of a matrix's inputs."""
        assert claim.scheme is not None
        if not claim.scheme.static_inputs:
            return {}
        if part.module not in self._of_inputs:
            heard = self._ranges[self._site_of[part.module].name]
            try:
                self._of_inputs[part.module] = claim.scheme.input_tensors(heard)
            except CheckpointError as error:
                raise CheckpointError(error.what, where=part.module, fix=error.fix) from error
        return self._of_inputs[part.module]

    def _put(self, claim: Claim, part: LinearPart, tensors: dict[str, torch.Tensor]) -> None:
        """Gives a matrix of the result's stream what an engine computes with."""
        scheme = claim.scheme
        assert scheme is not None
        if self._fed is None:
            return
        self._fed.put(part, scheme.decode(tensors, part.out_features, part.in_features))
        if scheme.rounds_inputs:
            self._fed.round_inputs(
                part, lambda x: scheme.round_inputs(x.reshape(-1, x.shape[-1]), tensors).view(x.shape)
            )


def _shared(ranges: Mapping[Site, InputRange]) -> dict[str, InputRange]:
    """The ranges of one step's sites by name; engines have one for all experts of a layer."""
    merged: dict[int, InputRange] = {}
    for site, heard in ranges.items():
        if site.routed:
            known = merged.get(site.in_features)
            merged[site.in_features] = heard if known is None else known.merge(heard)
    return {site.name: merged[site.in_features] if site.routed else heard for site, heard in ranges.items()}


def _alike(jobs: Sequence[_Heard]) -> list[list[_Heard]]:
    """Jobs that may be solved at once: of one scheme, solver and shape."""
    grouped: dict[object, list[_Heard]] = {}
    for job, moments in jobs:
        claim = job[0][0]
        shapes = tuple((part.out_features, part.in_features) for _, part in job)
        key = (claim.scheme, claim.solver, claim.role.input_norm, shapes, moments is None)
        grouped.setdefault(key, []).append((job, moments))
    return list(grouped.values())


def _item_bytes(claim: Claim) -> int:
    return claim.tensor.nbytes // claim.tensor.numel
