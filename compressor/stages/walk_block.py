"""One block of the walk: hears the inputs of its matrices, solves them, and passes the states on.

Legend: O out_features, I in_features, N tokens that reach a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import CheckpointError
from compressor.progress import Progress
from compressor.stages.base import Claim, Started, needs_data, needs_moments
from compressor.stages.experts import Experts
from compressor.stages.importance import norm_importance
from compressor.stages.input_scales import InputScales
from compressor.stages.jobs import (
    HeardJob,
    Job,
    alike,
    heard_jobs,
    heard_together,
    scale_groups,
    source_bytes,
    stacked,
    stored_tensors,
)
from compressor.stages.receipts import BlockError, Coverage, PartError
from compressor.stages.streams import Streams
from compressor.stages.walked import WalkedTensors

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Block, Site
    from compressor.model.hidden import HiddenStates
    from compressor.model.paused import PausedPasses
    from compressor.model.routed import Share
    from compressor.model.tape import Hear, Tape
    from compressor.solvers.statistics import Moments
    from compressor.spec import LinearPart
    from compressor.stages.smoothing import Smoother

_SHOWN = 3


class BlockWalk:
    """The work on one block.

    Args:
        source: the checkpoint.
        tape: of the calibration tokens.
        block: with the source's weights.
        claims: its quantized tensors.
        everything: tensor name -> claim, of the whole checkpoint.
        streams: the streams at the entrance of the block.
        moment_bytes: most bytes of statistics gathered in one pass.
        keep_inputs: keep what the source's stream feeds the matrices of this block, instead of computing it
            again for every step.
        fits: whether there is memory to learn the block, where its solvers do.

    Attributes:
        learned: what learning the block did, once it is solved; None where its solvers do not.
        smoothed: what smoothing it did (``Smoother.facts``); None where its solvers do not.
    """

    def __init__(
        self,
        source: Source,
        tape: Tape,
        block: Block,
        claims: Sequence[Claim],
        everything: Mapping[str, Claim],
        streams: Streams,
        *,
        moment_bytes: int,
        keep_inputs: bool,
        fits: bool,
    ) -> None:
        self._source, self._tape, self._streams = source, tape, streams
        self._exact = block
        self._fed = block.twin() if streams.fed is not None else None
        self._by_module = {part.module: (claim, part) for claim in claims for part in claim.role.parts}
        self._keep_inputs = keep_inputs
        self._fits = fits
        self.learned: BlockError | None = None
        self.smoothed: dict[str, Any] | None = None
        self._smoother: Smoother | None = None
        # What a matrix is to be solved from.
        self._weight: Callable[[LinearPart], torch.Tensor] = block.weight
        if any(claim.solver is not None and claim.solver.smoothing is not None for claim in claims):
            from compressor.stages.smoothing import Smoother

            self._smoother = Smoother(source, tape, block, self._fed, everything, self._by_module)
            self._weight = self._smoother.weight
        # What is to be learned, as solvers stored it.
        self._started: list[Started] = []
        self._learns = any(claim.solver is not None and claim.solver.learning is not None for claim in claims)
        # Whether the source's stream has passed the block.
        self._moved = False
        # Site name -> the source stream's inputs of each batch, once that stream has passed the block.
        self._inputs: dict[str, dict[int, torch.Tensor]] | None = None
        # The result's stream on its way through the block, where it waits for what is solved.
        self._paused: PausedPasses[Hear] | None = None
        self._scales = InputScales(block, self._by_module, streams.device)
        self._site_of = {part.module: site for step in block.steps for site in step for part in site.parts}
        # Number of a step, and sites with something to solve that are heard together.
        self._passes = [
            (number, sites)
            for number, step in enumerate(block.steps)
            for sites in heard_together(step, self._by_module.keys(), moment_bytes)
        ]
        self._jobs_of: dict[str, list[Job]] = {}
        needing = {
            site.expert
            for module, site in self._site_of.items()
            if site.routed and module in self._by_module and needs_data(self._by_module[module][0])
        }
        self._experts = Experts([site for step in block.steps for site in step], needing)

    def put_finished(self, walked: WalkedTensors) -> None:
        """Takes the block's quantized weights from what an interrupted run finished."""
        if self._smoother is not None:
            self._smoother.again(walked)
        for claim, part in self._by_module.values():
            self._put(claim, part, walked.local(part.module))

    def solve(self, path: Path, progress: Progress, note: str) -> list[PartError]:
        """Solves every claimed matrix and writes the block's file; returns their errors.

        Raises:
            CheckpointError: a weight is not finite.
            UserError: the disk is full.
        """
        errors: list[PartError] = []
        outputs = stored_tensors(self._by_module.values())
        smoothed: dict[str, torch.Tensor] = {}
        if self._smoother is not None:
            self._smoother.run(self._streams.exact, len(self._streams))
            self.smoothed = self._smoother.facts
            smoothed = self._smoother.tensors
            outputs += self._smoother.headers
        self._pass_exact()
        self._pause()
        with ShardWriter(path, outputs) as writer:
            for name, tensor in smoothed.items():
                writer.write(name, tensor)
            paired = [any(map(self._is_paired, sites)) for _, sites in self._passes]
            for at, (number, sites) in enumerate(self._passes):
                moments = self._hear(number, sites, ends=not any(paired[at + 1 :]))
                if self._moved and not self._learns:
                    later = [site for _, sites in self._passes[at:] for site in sites]
                    self._exact.drop([part for site in later for part in site.parts])
                jobs = [job for site in sites for job in heard_jobs(self._jobs(site), moments.get(site.name))]
                del moments
                for batch in alike(jobs):
                    errors += self._solve_jobs(batch, writer)
                    progress.advance(source_bytes(batch), note=note)
                del jobs, batch  # no two passes' statistics at once
            if self._started:
                errors = self._learn(errors, writer, progress)
        return errors

    def _learn(self, errors: Sequence[PartError], writer: ShardWriter, progress: Progress) -> list[PartError]:
        """Learns the matrices whose solvers ask for it together and writes them; returns all errors."""
        from compressor.solvers.measure import squares
        from compressor.stages.learn import learn_block

        assert self._fed is not None
        self.close()  # what waits has passed matrices that change once more
        self._move_exact()
        self.learned, tensors = learn_block(
            self._tape, self._fed, self._streams, self._started, self._weight, self._fits, progress
        )
        found = {error.module: error for error in errors}
        for start in self._started:
            module = start.part.module
            if module in tensors:
                self._put(start.claim, start.part, tensors[module])
                decoded_OI = self._fed.weight(start.part)
                found[module] = found[module].learned(*squares(self._weight(start.part), decoded_OI))
            self._write(writer, start.part, tensors.get(module, start.tensors))
        return list(found.values())

    @property
    def coverage(self) -> list[Coverage]:
        """What the experts were sent, once they are solved."""
        return self._experts.coverage(self._scales.is_shared)

    def advance(self) -> None:
        """Both streams pass the block: the source's with its weights, the result's with the stored ones."""
        self._move_exact()
        if self._fed is None or self._streams.fed is None:
            return
        for batch in range(len(self._streams)):
            if self._paused is None:
                output = self._through(self._fed, self._streams.fed, batch)
            else:
                output = _whole(self._paused.go_on(batch))
            self._streams.fed.put(batch, output)

    def _move_exact(self) -> None:
        """Has the source's stream behind the block."""
        if not self._moved:
            for batch in range(len(self._streams)):
                self._streams.exact.put(batch, self._through(self._exact, self._streams.exact, batch))
            self._moved = True

    def close(self) -> None:
        """Frees what waits for nothing any more."""
        if self._paused is not None:
            self._paused.close()
        self._paused = None

    def _pause(self) -> None:
        """Lets the result's stream wait at every step, where each is heard at once and memory may be kept."""
        at_once = len({number for number, _ in self._passes}) == len(self._passes)
        if self._streams.fed is None or not (self._keep_inputs and at_once and self._exact.layout.waits_well):
            return
        from compressor.model.paused import most_waiting

        if self._fed is not None and len(self._streams) <= most_waiting():
            self._paused = self._tape.paused(self._fed, self._streams.fed)

    def _through(
        self, block: Block, states: HiddenStates, batch: int, hear: Hear | None = None
    ) -> torch.Tensor:
        return _whole(self._tape.run(block, states, batch, hear=hear))

    def _pass_exact(self) -> None:
        """One pass of the source's stream, for the ranges of inputs and for inputs that are kept."""
        sites = [site for step in self._exact.steps for site in step]
        paired = {site.name for site in sites if self._keep_inputs and self._is_paired(site)}
        inputs: dict[str, dict[int, torch.Tensor]] = {name: {} for name in paired}
        moves = self._keep_inputs or self._fed is None
        if not (moves or self._scales.needed):
            return
        counting = self._experts.passing(())

        def hear(site: Site, x_NI: torch.Tensor, share: Share | None) -> None:
            self._scales.hear(site, x_NI)
            if share is not None:
                counting.hear(site, share)
            if site.name in paired:
                inputs[site.name][batch] = x_NI.clone()

        for batch in range(len(self._streams)):
            output = self._through(self._exact, self._streams.exact, batch, hear)
            if moves:
                self._streams.exact.put(batch, output)
        if moves:
            self._inputs = inputs
            self._moved = True
        self._scales.finish()
        counting.finish()

    def _is_heard(self, site: Site) -> bool:
        return any(needs_moments(job[0][0]) for job in self._jobs(site))

    def _is_paired(self, site: Site) -> bool:
        """Whether both streams hear the same tokens there: experts may be given others by either."""
        return not site.routed and self._is_heard(site)

    def _hear(self, step: int, sites: Sequence[Site], *, ends: bool) -> dict[str, Moments]:
        """Moments of the inputs of ``sites``, with cross moments where both streams hear the same tokens.

        ``ends``: what the source's stream feeds the block is not asked for again: it may pass to its end.
        """
        from compressor.numerics.row_weights import row_norms
        from compressor.solvers.statistics import MomentSums, Routed, add_together

        heard = [site for site in sites if self._is_heard(site)]
        if not heard:
            return {}
        assert self._fed is not None
        assert self._streams.fed is not None
        device, paired = self._streams.device, {site.name for site in heard if not site.routed}
        sums = {}
        for site in heard:
            weight_OI = None if site.routed else stacked(self._jobs(site), self._exact.weight)
            sums[site.name] = MomentSums(site.in_features, device, not site.routed, weight_OI=weight_OI)
        exact: dict[str, torch.Tensor] = {}
        # Of all experts, so that what is long does not depend on which of them are heard together.
        here, routed = {site.name for site in self._exact.steps[step]}, list[Routed]()
        moves = ends and bool(paired) and not self._moved
        topping = self._experts.passing(heard)

        def keep(site: Site, x_NI: torch.Tensor, share: Share | None) -> None:
            if site.name in paired:
                exact[site.name] = x_NI.clone() if moves else x_NI

        def add(site: Site, x_NI: torch.Tensor, share: Share | None) -> None:
            if site.name in paired:
                sums[site.name].add(self._rounded(site, x_NI), exact.pop(site.name))
            elif share is not None:
                topping.hear(site, share)
                if site.name in here:
                    own = sums.get(site.name)
                    fed_NI = x_NI if own is None else self._rounded(site, x_NI)
                    routed.append(Routed(own, row_norms(x_NI), fed_NI))

        for batch in range(len(self._streams)):
            if self._inputs is not None:
                exact.update({name: self._inputs[name].pop(batch) for name in paired})
            elif moves:
                self._streams.exact.put(batch, self._through(self._exact, self._streams.exact, batch, keep))
            elif paired:
                self._tape.run(self._exact, self._streams.exact, batch, hear=keep, until=step)
            if self._paused is not None:
                self._paused.go_on(batch, step, add)
            else:
                self._tape.run(self._fed, self._streams.fed, batch, hear=add, until=step)
            add_together(routed)
            routed.clear()
        self._moved = self._moved or moves
        topping.finish()
        for site in heard:
            spare_RI = topping.rows(site) if site.routed else None
            if spare_RI is not None:
                sums[site.name].add(self._rounded(site, spare_RI))
        return {name: total.result() for name, total in sums.items()}

    def _jobs(self, site: Site) -> list[Job]:
        """The claimed matrices of a site, those that share a tensor-level scale together."""
        if site.name not in self._jobs_of:
            modules = [heard.module for heard in site.parts if heard.module in self._by_module]
            self._jobs_of[site.name] = scale_groups(self._by_module[module] for module in modules)
        return self._jobs_of[site.name]

    def _solve_jobs(self, batch: Sequence[HeardJob], writer: ShardWriter) -> list[PartError]:
        """Solves jobs of one scheme and solver, each with moments of its own."""
        claim, first = batch[0][0][0]
        scheme, solver = claim.scheme, claim.solver
        assert scheme is not None
        assert solver is not None
        groups = [([self._weight(part) for _, part in job], moments) for job, moments in batch]
        try:
            norms = None if self._smoother is None else self._smoother.norms
            importance_I = norm_importance(self._source, claim.role.input_norm, first.in_features, norms)
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
                tensors = result.tensors | self._scales.of(claim, part)
                if solver.learning is None:
                    self._write(writer, part, tensors)
                else:
                    self._started.append(Started(claim, part, tensors))
                self._put(claim, part, tensors)
                spare = self._experts.topped_up(self._site_of[part.module])
                rows = None if moments is None else moments.rows
                found = PartError.of(part, scheme, result, rows, 0 if rows is None else spare)
                errors.append(found if self._smoother is None else self._smoother.told(found))
        return errors

    def _write(self, writer: ShardWriter, part: LinearPart, tensors: Mapping[str, torch.Tensor]) -> None:
        for local, tensor in tensors.items():
            writer.write(f"{part.module}.{local}", tensor)

    def _rounded(self, site: Site, x_NI: torch.Tensor) -> torch.Tensor:
        """Inputs as an engine rounds them before it multiplies."""
        claim, part = self._jobs(site)[0][0]
        assert claim.scheme is not None
        if not claim.scheme.rounds_inputs:
            return x_NI
        return claim.scheme.round_inputs(x_NI, self._scales.of(claim, part))

    def _put(self, claim: Claim, part: LinearPart, tensors: dict[str, torch.Tensor]) -> None:
        """Gives a matrix of the result's stream what an engine computes with."""
        scheme = claim.scheme
        assert scheme is not None
        if self._fed is None:
            return
        self._fed.put(part, scheme.decode(tensors, part.out_features, part.in_features))
        if scheme.rounds_inputs:
            from compressor.stages.training import rounding

            self._fed.round_inputs(part, rounding(scheme, tensors))


def _whole(output: torch.Tensor | None) -> torch.Tensor:
    assert output is not None, "nothing stops the pass"
    return output
