"""The weights stage when solvers need data: block by block, each solved on the inputs that it will meet.

Two streams of hidden states pass through the blocks: those of the source, and those that the result computes,
whose blocks so far are quantized. A block's matrices are solved in the order in which they compute, on what
the matrices before them already changed. A finished block has a file and a receipt; a killed run starts again
at the first block without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source, let_go
from compressor.device import collect_memory, pick_device, return_freed_memory
from compressor.errors import CheckpointError
from compressor.model.families import block_index
from compressor.progress import Progress
from compressor.stages.ahead import compile_ahead
from compressor.stages.base import Claim, needs_calibration, needs_data, needs_range
from compressor.stages.receipts import (
    BlockError,
    Coverage,
    PartError,
    all_receipts,
    drop_receipt,
    is_whole,
    write_receipt,
)
from compressor.stages.streams import Streams
from compressor.stages.tokens import calibration_tokens
from compressor.stages.walk_block import BlockWalk
from compressor.stages.walked import WalkedTensors, layer_name

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Block
    from compressor.model.tape import Tape


# Sequences and tokens of each with which folds are tried.
_SMALL = (2, 8)


@dataclass(frozen=True)
class WalkSpec:
    """How the walk computes.

    Attributes:
        batch_tokens: tokens of one forward pass, at least one sequence.
        dtype: of the forward passes.
        states: where the hidden states are kept.
        moment_bytes: most bytes of statistics that one pass over the data gathers.
        keep_inputs: keep all that a block's matrices are fed, instead of computing it again for every step.
        unlearned: numbers of the blocks that take too much memory to be learned, so that their start stays.
        read_ahead: the next block is read while one is worked on.
        stored_experts: experts are read when they are computed with; for walks that replace no matrix.
    """

    batch_tokens: int
    dtype: Literal["float32", "bfloat16"]
    states: Literal["device", "host", "disk"]
    moment_bytes: int
    keep_inputs: bool
    unlearned: tuple[int, ...] = ()
    read_ahead: bool = True
    stored_experts: bool = False


def walk_stage(
    source: Source,
    claims: Sequence[Claim],
    calibration: CalibrationSpec,
    spec: WalkSpec,
    folder: Path,
    progress: Progress,
    *,
    evict: bool = False,
) -> dict[str, Any]:
    """Makes the calibration tokens and walks; facts for the report: ``resumed``, and ``calibration``.

    ``evict``: see ``walk``.

    Raises:
        CheckpointError: as ``walk``, or the source has no tokenizer.
        UserError: as ``walk``, or a text cannot be read or is too short.
    """
    compile_ahead(claims)
    return_freed_memory()
    if evict:
        _let_go_blocks(source, claims)
    shown = calibration_tokens(source, calibration, folder, progress)
    resumed = walk(source, claims, shown.ids_NT, spec, folder, progress, prompts=shown.prompts, evict=evict)
    collect_memory()
    facts = {
        "texts": shown.counts,
        "samples": calibration.samples,
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "dtype": spec.dtype,
        "blocks": [asdict(block) for block in _learned(folder)],
        **_smoothed(folder),
        "experts": [asdict(coverage) for coverage in _coverage(folder)],
    }
    return {"resumed": resumed, "calibration": facts}


def walk(
    source: Source,
    claims: Sequence[Claim],
    ids_NT: torch.Tensor,
    spec: WalkSpec,
    folder: Path,
    progress: Progress,
    *,
    prompts: Sequence[Mapping[str, torch.Tensor]] = (),
    evict: bool = False,
) -> bool:
    """Writes a file and a receipt for every block; returns whether any was found finished.

    Args:
        source: the checkpoint.
        claims: of all its tensors; those outside of blocks are left to the stream.
        ids_NT: int64, one full calibration sequence a row.
        spec: how to compute.
        folder: of the stage.
        progress: told of every matrix.
        prompts: with images, a batch each (``Tape.record``).
        evict: frees the disk of what was fetched of the source once nothing more is read of it.

    Raises:
        CheckpointError: the model cannot be walked, or a weight is not finite.
        UserError: the disk is full.
    """
    import torch

    from compressor.model.tape import Tape

    with torch.no_grad():
        streams = Streams(folder, spec.states, pick_device(), feeding=any(map(needs_calibration, claims)))
        batches = _batches(claims, ids_NT, spec.batch_tokens)
        prompts = prompts if batches else ()
        tape = Tape.record(
            source,
            batches,
            dtype=getattr(torch, spec.dtype),
            device=streams.device,
            states=streams.exact,
            small=_few(ids_NT),
            prompts=prompts,
        )
        by_block = _by_block(tape, claims, progress)
        done = _begin(folder, by_block, progress)
        if not all(done):
            first = streams.begin(len(batches) + len(prompts), done.index(False))
            _forget_broken(folder, done)
            finished = WalkedTensors(folder)
            _let_go(source, tape, range(first, len(by_block))[:2], evict)  # not the last norm's file
            for index, block in _loaded(tape, range(first, len(by_block)), spec):
                work = BlockWalk(
                    source,
                    tape,
                    block,
                    by_block[index],
                    {claim.tensor.name: claim for claim in claims},
                    streams,
                    moment_bytes=spec.moment_bytes,
                    keep_inputs=spec.keep_inputs,
                    fits=index not in spec.unlearned,
                )
                with closing(work):
                    if done[index]:
                        work.put_finished(finished)
                    else:
                        path = folder / layer_name(index)
                        errors = work.solve(path, progress, note=tape.blocks[index])
                        write_receipt(folder, path.name, errors, work.learned, work.smoothed, work.coverage)
                    if batches and index + 1 < len(by_block):
                        work.advance()
                        streams.keep(index + 1)
                _let_go(source, tape, range(index + 1, len(by_block)), evict)
        streams.discard()
    _warn_of_fallbacks(folder, progress)
    _warn_of_unlearned(folder, progress)
    _warn_of_starved(folder, progress)
    progress.finish(resumed=all(done))
    return any(done)


def _begin(folder: Path, by_block: Sequence[Sequence[Claim]], progress: Progress) -> list[bool]:
    """Which blocks an earlier run has finished; tells ``progress`` how much that is of all."""
    done = [is_whole(folder, layer_name(index)) for index in range(len(by_block))]
    sizes = [sum(claim.tensor.nbytes for claim in members) for members in by_block]
    already = sum(size for size, finished in zip(sizes, done, strict=True) if finished)
    progress.start("walk", sum(sizes), "work", done=already)
    return done


def _let_go_blocks(source: Source, claims: Sequence[Claim]) -> None:
    """Frees the disk of what a killed run fetched of blocks, beside which others would be fetched first."""
    let_go(source, {claim.tensor.name for claim in claims if block_index(claim.tensor.name) is None})


def _let_go(source: Source, tape: Tape, still_read: range, evict: bool) -> None:
    """Frees the disk of what was fetched for other blocks than these, if asked to."""
    if evict:
        let_go(source, {name for index in still_read for name in tape.tensors(index)})


def _batches(claims: Sequence[Claim], ids_NT: torch.Tensor, most_tokens: int) -> Sequence[torch.Tensor]:
    """A few rows at a time; none before a polish of plain rounding, where nothing is to be heard."""
    if not any(needs_data(claim) for claim in claims):
        return ()
    import torch

    return torch.split(ids_NT, max(1, most_tokens // ids_NT.shape[1]))


def _few(ids_NT: torch.Tensor) -> torch.Tensor:
    """Tokens of a small call."""
    rows, length = _SMALL
    return ids_NT[:rows, :length]


def _forget_broken(folder: Path, done: Sequence[bool]) -> None:
    """A block whose file is not what its receipt says is solved again."""
    for index, finished in enumerate(done):
        if not finished:
            drop_receipt(folder, layer_name(index))


def _warn_of_fallbacks(folder: Path, progress: Progress) -> None:
    """Says which matrices another solver had than the one asked for, but for those that it served as well."""
    reasons: dict[str, list[str]] = {}
    for receipt in all_receipts(folder):
        for error in (PartError(**error) for error in receipt["errors"]):
            if error.note is not None and error.output_error is None:
                reasons.setdefault(error.note, []).append(error.module)
    for reason, modules in reasons.items():
        more = f" and {len(modules) - 2} more" if len(modules) > 2 else ""
        progress.warn(f"solved without calibration data ({reason}): {', '.join(modules[:2])}{more}")


def _learned(folder: Path) -> list[BlockError]:
    """Of the blocks that were to be learned, in order."""
    return [BlockError(**receipt["block"]) for receipt in all_receipts(folder) if "block" in receipt]


def _smoothed(folder: Path) -> dict[str, Any]:
    """What smoothing did: ``smoothed`` (of every input) and ``changed_16bit``; empty without any."""
    found = [receipt["smoothing"] for receipt in all_receipts(folder) if "smoothing" in receipt]
    if not found:
        return {}
    return {
        "smoothed": [made for facts in found for made in facts["inputs"]],
        "changed_16bit": [name for facts in found for name in facts["changed_16bit"]],
    }


def _coverage(folder: Path) -> list[Coverage]:
    """Of all modules of experts, in order."""
    return [
        Coverage(**{**facts, "tokens": tuple(facts["tokens"]), "topped_up": tuple(facts["topped_up"])})
        for receipt in all_receipts(folder)
        for facts in receipt.get("experts", ())
    ]


def _warn_of_starved(folder: Path, progress: Progress) -> None:
    """Says in one line how many experts were sent too few tokens."""
    found = _coverage(folder)
    starved = sum(coverage.starved for coverage in found)
    if not starved:
        return
    experts = sum(len(coverage.tokens) for coverage in found)
    never = sum(coverage.never_reached for coverage in found)
    least = sorted({coverage.enough for coverage in found})
    progress.warn(
        f"{starved:,} of {experts:,} experts were sent fewer than {' or '.join(map(str, least))} calibration "
        f"tokens, {never:,} of them none: more text, or longer, would calibrate them better"
    )


def _warn_of_unlearned(folder: Path, progress: Progress) -> None:
    """Says which blocks were not learned although they were to be."""
    reasons: dict[str, list[str]] = {}
    for block in _learned(folder):
        if block.skipped is not None:
            reasons.setdefault(block.skipped, []).append(block.name)
    for reason, blocks in reasons.items():
        progress.warn(f"not learned, left as the start solver made them ({reason}): {', '.join(blocks)}")


def _by_block(tape: Tape, claims: Sequence[Claim], progress: Progress) -> list[list[Claim]]:
    """The quantized claims of every block whose inputs can be heard; the others are left to the stream.

    Raises:
        CheckpointError: a claim needs the range of inputs that cannot be heard.
    """
    by_tensor = {claim.tensor.name: claim for claim in claims if claim.scheme is not None}
    left = {name: reason for name, reason in tape.unheard.items() if name in by_tensor}
    # What shares a tensor-level scale is solved in one place.
    shared = {group: left[name] for name in left for group in _shared_scales(by_tensor[name])}
    for name, claim in by_tensor.items():
        for group in _shared_scales(claim) & shared.keys():
            left.setdefault(name, shared[group])
    for name in left:
        del by_tensor[name]
    found = [
        [by_tensor.pop(name) for name in tape.tensors(index) if name in by_tensor]
        for index in range(len(tape.blocks))
    ]
    left |= dict.fromkeys(by_tensor, "it lies in no block")
    for claim in claims:
        reason = left.get(claim.tensor.name)
        if reason is not None and needs_range(claim):
            raise CheckpointError(
                f"its inputs cannot be measured: {reason}",
                where=claim.tensor.name,
                fix="give it a scheme that stores nothing of its inputs, or leave it in 16 bit with ignore",
            )
        if reason is not None and needs_data(claim):
            progress.warn(f"{claim.tensor.name} is solved without calibration data: {reason}")
    return found


def _shared_scales(claim: Claim) -> set[str]:
    """The fuse groups whose tensor-level scale the claim's matrices share."""
    if claim.scheme is None or not claim.scheme.shares_tensor_scale:
        return set()
    return {part.fuse_group for part in claim.role.parts if part.fuse_group is not None}


def _loaded(tape: Tape, indices: range, spec: WalkSpec) -> Iterator[tuple[int, Block]]:
    """Blocks with their weights; the next is read while the present one is worked on, if memory allows."""
    load = partial(tape.load, stored_experts=spec.stored_experts)
    if not spec.read_ahead:
        for index in indices:
            yield index, tape.place(load(index))
        return
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        pending = reader.submit(load, indices[0])
        for index in indices:
            block = tape.place(pending.result())
            if index + 1 in indices:
                pending = reader.submit(load, index + 1)
            yield index, block
            del block
    finally:
        # An interrupted run does not wait for what is being read.
        reader.shutdown(wait=False, cancel_futures=True)
