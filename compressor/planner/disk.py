"""Disk space while a run goes on: what is fetched of a source while it is read, and what is written."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from compressor.checkpoint.base import FetchedFiles, Source, fetched_files
from compressor.errors import UserError
from compressor.planner.calibrated import WalkPlan
from compressor.planner.predict import Prediction
from compressor.planner.sizes import in_block
from compressor.planner.walkable import decoder_blocks
from compressor.stages.base import Claim, Shard
from compressor.stages.stream import tensors_read

_WHERE = "workspace.max_bytes"


@dataclass(frozen=True)
class Step:
    """One step of a stage that reads a source in order.

    Attributes:
        reads: tensors, those that are read ahead too.
        written_bytes: what is on the disk when it is done and was not before.
    """

    reads: Set[str]
    written_bytes: int


def bounded(
    prediction: Prediction,
    source: Source,
    claims: Sequence[Claim],
    shards: Sequence[Shard],
    walk: WalkPlan | None,
    *,
    needs_whole: str,
    max_bytes: int | None,
    faults: list[UserError],
) -> tuple[Prediction, bool]:
    """The prediction within a bound on the disk, and whether that takes removing what was fetched.

    Args:
        prediction: with the whole source on the disk, where it is fetched at all.
        source: opened.
        claims: of all tensors.
        shards: that the stream writes.
        walk: before the stream, if any.
        needs_whole: what else in the plan reads the source as a whole, from the disk; "" for nothing.
        max_bytes: the bound; None for none.
        faults: gets what is wrong.
    """
    if max_bytes is None or prediction.disk_bytes <= max_bytes:
        return prediction, False
    fix = f"set it to {_at_least(prediction.disk_bytes)} or more"
    files = fetched_files(source)
    if files is None:
        faults.append(UserError(_too_much(prediction.disk_bytes, max_bytes), where=_WHERE, fix=fix))
        return prediction, False
    if needs_whole:
        what = (
            f"{_too_much(prediction.disk_bytes, max_bytes)}: {needs_whole} needs the whole source on the disk"
        )
        faults.append(UserError(what, where=_WHERE, fix=fix))
        return prediction, False
    least = _evicting_bytes(files, claims, shards, walk)
    if least > max_bytes:
        what = f"{_too_much(least, max_bytes)}, though of the source only what is being read lies there"
        fix = f"set it to {_at_least(least)} or more; a smaller export.max_shard_bytes may need less"
        faults.append(UserError(what, where=_WHERE, fix=fix))
    return replace(prediction, disk_bytes=least), True


def peak_bytes(steps: Sequence[Step], files: FetchedFiles) -> int:
    """Most bytes on the disk: files from the step that first reads them to the last that does, and what is
    written.
    """
    last: dict[str, int] = {}
    first: dict[str, int] = {}
    for number, step in enumerate(steps):
        for file in {file for name in step.reads for file in files.homes.get(name, ())}:
            first.setdefault(file, number)
            last[file] = number
    peak = written = 0
    for number, step in enumerate(steps):
        written += step.written_bytes
        fetched = sum(files.file_bytes[file] for file in last if first[file] <= number <= last[file])
        peak = max(peak, fetched + written)
    return peak


def _too_much(needed: int, most: int) -> str:
    return f"the run needs {needed / 1e6:,.1f} MB of disk, more than {most / 1e6:,.1f} MB"


def _at_least(size: int) -> str:
    """A size as a recipe states it, rounded up."""
    return f"{-(-size // 1_000_000)}MB"


def _evicting_bytes(
    files: FetchedFiles, claims: Sequence[Claim], shards: Sequence[Shard], walk: WalkPlan | None
) -> int:
    """The most that lies on the disk where files of the source are removed when they are read no more."""

    def is_walked(claim: Claim) -> bool:
        return walk is not None and claim.scheme is not None and in_block(claim)

    streamed = [Step(tensors_read(shard, is_walked), shard.result_bytes) for shard in shards]
    peak = peak_bytes(streamed, files)
    if walk is None:
        return peak
    steps = _walk_steps(claims)
    # A killed run reads what comes before the blocks once more, when it has written any of them.
    before = {file for name in _before_blocks(claims, walk) for file in files.homes.get(name, ())}
    again = sum(files.file_bytes[file] for file in before) + sum(step.written_bytes for step in steps)
    return max(max(peak_bytes(steps, files), again) + walk.kept_bytes, walk.walked_bytes + peak)


def _before_blocks(claims: Sequence[Claim], walk: WalkPlan) -> set[str]:
    """The tensors that computing the first block's inputs reads, the decoder's last norm with them."""
    decoder = {claim.tensor.name for members in decoder_blocks(claims).values() for claim in members}
    return {
        claim.tensor.name
        for claim in claims
        if claim.tensor.name not in decoder
        and claim.role.kind != "lm_head"
        and (walk.calibration.images is not None or not in_block(claim))
    }


def _walk_steps(claims: Sequence[Claim]) -> list[Step]:
    """Each block, while the next one is read."""
    blocks = decoder_blocks(claims)
    numbers = sorted(blocks)
    reads = [{claim.tensor.name for claim in blocks[number]} for number in numbers]
    written = [
        sum(claim.result_bytes for claim in blocks[number] if claim.scheme is not None) for number in numbers
    ]
    return [Step(set[str]().union(*reads[at : at + 2]), size) for at, size in enumerate(written)]
