"""Tensors pass read -> solve -> write, with no model at all; what a walk has solved is put in its place.

Finished shards stay in the stage's working folder with a receipt each; a killed run starts again at the
first shard without one. Peak memory is one group of matrices that share a scale, and the next being read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source, let_go
from compressor.checkpoint.kept import KeptSource
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.checkpoint.safetensors_writer import ShardWriter, shard_names
from compressor.dialects.base import Dialect
from compressor.errors import CheckpointError
from compressor.model.names import extract
from compressor.progress import Progress
from compressor.spec import LinearPart
from compressor.stages.base import Claim, Shard, Unit
from compressor.stages.importance import norm_importance
from compressor.stages.receipts import PartError, read_receipt, write_receipt
from compressor.stages.walked import Finished

if TYPE_CHECKING:
    import torch


# Values of a copied tensor that are looked at together: what tells whether they are finite takes memory too.
_CHECKED_VALUES = 1 << 24


@dataclass(frozen=True)
class Job:
    """Parts that are solved together, and where each comes from; a copy has no parts."""

    claims: tuple[Claim, ...]
    parts: tuple[tuple[Claim, LinearPart], ...]

    @property
    def source_bytes(self) -> int:
        """What the job's matrices, or copied tensors, take in the source."""
        if not self.parts:
            return sum(claim.tensor.nbytes for claim in self.claims)
        return sum(
            claim.tensor.nbytes * part.out_features * part.in_features // claim.tensor.numel
            for claim, part in self.parts
        )

    @property
    def read_bytes(self) -> int:
        """What is held while the job's tensors are read; of these, ``held_bytes`` stay."""
        return self._entry_bytes + (self.source_bytes if self._is_extracted else 0)

    @property
    def held_bytes(self) -> int:
        """What is held of the job's tensors until it is done: all, or the matrices taken out of them."""
        return self.source_bytes if self._is_extracted else self._entry_bytes

    @property
    def _is_extracted(self) -> bool:
        return any(part.transposed for _, part in self.parts)

    @property
    def _entry_bytes(self) -> int:
        if not self.parts:
            return self.source_bytes
        entries = {(claim.tensor, part.expert) for claim, part in self.parts}
        return sum(tensor.nbytes // (1 if expert is None else tensor.shape[0]) for tensor, expert in entries)


def stream(
    source: Source,
    shards: Sequence[Shard],
    dialect: Dialect,
    folder: Path,
    progress: Progress,
    walked: Finished | None = None,
    *,
    evict: bool = False,
) -> bool:
    """Writes every shard and its receipt into ``folder``; returns whether any was found finished.

    ``walked``: tensors of the result that calibration has already made. ``evict``: frees the disk of what was
    fetched of the source once nothing more is read of it.

    Raises:
        CheckpointError: a weight is not finite, or the source changed or is truncated.
        UserError: the disk is full.
    """
    names = shard_names(len(shards))
    finished = [read_receipt(folder, name) is not None for name in names]
    total = sum(shard.source_bytes for shard in shards)
    already = sum(shard.source_bytes for shard, done in zip(shards, finished, strict=True) if done)
    progress.start("weights", total, "bytes", done=already)
    left = {name: shard for name, shard, done in zip(names, shards, finished, strict=True) if not done}
    reads = {name: tensors_read(shard, partial(_is_walked, walked)) for name, shard in left.items()}
    for name, shard in left.items():
        if evict:
            let_go(source, set[str]().union(*reads.values()))
        errors = _write_shard(source, shard, dialect, folder / name, progress, walked)
        write_receipt(folder, name, errors)
        del reads[name]
    if evict:
        let_go(source, set())
    progress.finish(resumed=all(finished))
    return any(finished)


def tensors_read(shard: Shard, is_walked: Callable[[Claim], bool]) -> set[str]:
    """The source tensors that writing a shard reads."""
    claims = [claim for unit in shard.units for claim in unit.claims if not is_walked(claim)]
    norms = (claim.role.input_norm for claim in claims if claim.scheme is not None)
    return {claim.tensor.name for claim in claims} | {norm.tensor for norm in norms if norm is not None}


def _write_shard(
    source: Source,
    shard: Shard,
    dialect: Dialect,
    path: Path,
    progress: Progress,
    walked: Finished | None,
) -> list[PartError]:
    claims = [claim for unit in shard.units for claim in unit.claims]
    done = [claim for claim in claims if _is_walked(walked, claim)]
    names = {claim.tensor.name for claim in done}
    jobs = [job for unit in shard.units for job in jobs_of(unit, leave_out=names)]
    errors: list[PartError] = []
    with ShardWriter(path, [output for claim in claims for output in claim.outputs]) as writer:
        for claim in done:
            assert walked is not None
            errors += _write_walked(claim, walked, dialect, writer)
            progress.advance(claim.tensor.nbytes, note=path.name)
        for job, tensors in _read_ahead(source, jobs):
            if job.parts:
                claim, part = job.parts[0]
                importance_I = norm_importance(source, claim.role.input_norm, part.in_features)
                errors += _solve(job, tensors, importance_I, dialect, writer)
            elif job.claims[0].kept is not None:
                for output, tensor in zip(job.claims[0].outputs, tensors, strict=True):
                    writer.write(output.name, tensor)
            else:
                for claim, tensor in zip(job.claims, tensors, strict=True):
                    changed = None if walked is None else walked.changed(claim.tensor.name)
                    _write_copy(claim, tensor if changed is None else changed, writer)
            progress.advance(job.source_bytes, note=path.name)
            del tensors  # or they would be held until the next but one has been read
    return errors


def _is_walked(walked: Finished | None, claim: Claim) -> bool:
    return walked is not None and claim.scheme is not None and claim.role.parts[0].module in walked


def _write_walked(claim: Claim, walked: Finished, dialect: Dialect, writer: ShardWriter) -> list[PartError]:
    assert claim.scheme is not None
    for part in claim.role.parts:
        for local, tensor in dialect.spell(claim.scheme, walked.local(part.module)).items():
            writer.write(f"{part.module}.{local}", tensor)
    return [walked.error(part.module) for part in claim.role.parts]


def jobs_of(unit: Unit, leave_out: Set[str] = frozenset()) -> list[Job]:
    """Splits a unit into the smallest groups that must be solved together: experts one by one."""
    grouped: dict[str, list[tuple[Claim, LinearPart]]] = {}
    copies = []
    for claim in unit.claims:
        if claim.tensor.name in leave_out:
            continue
        if claim.scheme is None:
            copies.append(Job((claim,), ()))
            continue
        for part in claim.role.parts:
            # Only schemes with a shared tensor scale need their fuse group together.
            shared = part.fuse_group if claim.scheme.shares_tensor_scale else None
            grouped.setdefault(shared or part.module, []).append((claim, part))
    return copies + [Job(tuple(claim for claim, _ in parts), tuple(parts)) for parts in grouped.values()]


def _read(source: Source, job: Job) -> list[torch.Tensor]:
    if not job.parts:
        return [tensor for claim in job.claims for tensor in _read_whole(source, claim)]
    read: dict[tuple[str, int | None], torch.Tensor] = {}
    for claim, part in job.parts:
        key = (claim.tensor.name, part.expert)
        if key not in read:
            read[key] = source.read(claim.tensor.name, part.expert)
    return [extract(read[claim.tensor.name, part.expert], part) for claim, part in job.parts]


def _read_whole(source: Source, claim: Claim) -> list[torch.Tensor]:
    """The tensor, or, where it is kept, what the source stores for it in the order of the outputs."""
    if claim.kept is None:
        return [source.read(claim.tensor.name)]
    while isinstance(source, ReconfiguredSource):
        source = source.inner
    assert isinstance(source, KeptSource), "only such a source has anything to keep"
    return list(source.stored(claim.tensor.name).values())


def _read_ahead(source: Source, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[torch.Tensor]]]:
    """Reads the next job's tensors while the present one is being solved."""
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        pending = reader.submit(_read, source, jobs[0]) if jobs else None
        for index, job in enumerate(jobs):
            assert pending is not None
            tensors = pending.result()
            following = index + 1 < len(jobs)
            pending = reader.submit(_read, source, jobs[index + 1]) if following else None
            yield job, tensors
            del tensors
    finally:
        # An interrupted run does not wait for what is being read.
        reader.shutdown(wait=False, cancel_futures=True)


def _solve(
    job: Job,
    weights_OI: list[torch.Tensor],
    importance_I: torch.Tensor | None,
    dialect: Dialect,
    writer: ShardWriter,
) -> list[PartError]:
    scheme, solver = job.claims[0].scheme, job.claims[0].solver
    assert scheme is not None
    assert solver is not None
    try:
        solved = solver.solve(weights_OI, scheme, importance_I)
    except CheckpointError as error:
        names = ", ".join(part.module for _, part in job.parts)
        raise CheckpointError(error.what, where=names, fix=error.fix) from error
    errors = []
    for (_, part), result in zip(job.parts, solved, strict=True):
        for local, tensor in dialect.spell(scheme, result.tensors).items():
            writer.write(f"{part.module}.{local}", tensor)
        size = part.out_features * part.in_features
        errors.append(PartError(part.module, scheme.label, result.squared_error, result.squared_norm, size))
    return errors


def _write_copy(claim: Claim, tensor: torch.Tensor, writer: ShardWriter) -> None:
    import torch

    pieces = torch.split(tensor.flatten(), _CHECKED_VALUES)
    if tensor.is_floating_point() and not all(bool(piece.isfinite().all()) for piece in pieces):
        raise CheckpointError(
            "the tensor has non-finite values (NaN or infinite)",
            where=claim.tensor.name,
            fix="the source is damaged or was saved wrongly: fetch it again",
        )
    if claim.outputs[0].dtype != claim.tensor.dtype:
        tensor = tensor.to(torch.bfloat16)
    if claim.outputs[0].name == claim.tensor.name:
        writer.write(claim.tensor.name, tensor)
        return
    for part, output in zip(claim.role.parts, claim.outputs, strict=True):
        writer.write(output.name, extract(tensor, part))
