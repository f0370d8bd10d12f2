"""The values that a group would have under each of its options: solved once, kept, and put into blocks.

Legend: N rows of inputs, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import FileHeader, read_header, read_tensor
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import CheckpointError
from compressor.model.names import extract
from compressor.solvers.base import Solver
from compressor.stages.base import Claim, Unit
from compressor.stages.budget_spec import Group, Stored
from compressor.stages.importance import norm_importance
from compressor.stages.receipts import PartError, all_receipts, is_whole, read_receipt, write_receipt
from compressor.stages.stream import Job, jobs_of

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Block
    from compressor.stages.input_scales import InputScales


def values_name(block: int) -> str:
    """The file with all options' values of one block."""
    return f"values-{block:05d}.safetensors"


def quantized(group: Group, option: Stored, solver: Solver) -> tuple[Claim, ...]:
    """The group's claims under an option of its that is not 16 bit."""
    assert option.scheme is not None
    return tuple(
        replace(claim, action="quantize", scheme=option.scheme, solver=solver) for claim in group.claims
    )


def solve_values(
    source: Source,
    groups: Sequence[Group],
    solver: Solver,
    scales: Mapping[str, InputScales],
    path: Path,
) -> None:
    """Writes every option's tensors of the groups of one block, and a receipt with their errors.

    Args:
        source: the checkpoint.
        groups: of the block.
        solver: needs no calibration.
        scales: option -> what was heard of inputs, for schemes that store it.
        path: ``values_name`` in the stage's folder.

    Raises:
        CheckpointError: a weight is not finite.
        UserError: the disk is full.
    """
    jobs = [
        (option, job)
        for group in groups
        for option in group.options
        if option.scheme is not None
        for job in jobs_of(Unit(quantized(group, option, solver)))
    ]
    headers = [
        replace(output, name=f"{option.name}/{output.name}")
        for option, job in jobs
        for claim, part in job.parts
        if option.scheme is not None
        for output in option.scheme.outputs(
            part.module, part.out_features, part.in_features, dtype=claim.tensor.dtype
        )
    ]
    errors = []
    with ShardWriter(path, headers) as writer:
        for option, job in jobs:
            errors += _solve(source, option, job, scales.get(option.name), writer)
    write_receipt(path.parent, path.name, errors)


def _solve(
    source: Source, option: Stored, job: Job, scales: InputScales | None, writer: ShardWriter
) -> list[PartError]:
    """Solves the matrices of a job exactly as the stream would."""
    claim, first = job.parts[0]
    assert claim.scheme is not None
    assert claim.solver is not None
    weights_OI = [extract(source.read(claim.tensor.name, part.expert), part) for claim, part in job.parts]
    importance_I = norm_importance(source, claim.role.input_norm, first.in_features)
    try:
        solved = claim.solver.solve(weights_OI, claim.scheme, importance_I)
    except CheckpointError as error:
        names = ", ".join(part.module for _, part in job.parts)
        raise CheckpointError(error.what, where=names, fix=error.fix) from error
    errors = []
    for (of, part), result in zip(job.parts, solved, strict=True):
        stored = result.tensors | ({} if scales is None else scales.of(of, part))
        for local, tensor in stored.items():
            writer.write(f"{option.name}/{part.module}.{local}", tensor)
        size = part.out_features * part.in_features
        errors.append(
            PartError(part.module, claim.scheme.label, result.squared_error, result.squared_norm, size)
        )
    return errors


class Values:
    """The solved values of one block, read from its file.

    Raises:
        CheckpointError: the file has changed since it was written.
    """

    def __init__(self, path: Path) -> None:
        if not is_whole(path.parent, path.name):
            raise CheckpointError(
                "what an earlier run solved has changed since it was written",
                where=str(path),
                fix="run again with --fresh",
            )
        self._path, self._file = path, read_header(path)
        self._by_module: dict[str, list[str]] = {}
        for name in self._file.headers:
            self._by_module.setdefault(name.rpartition(".")[0], []).append(name)

    def has(self, option: Stored, module: str) -> bool:
        """Whether a matrix was solved under an option."""
        return f"{option.name}/{module}" in self._by_module

    def local(self, option: Stored, module: str) -> dict[str, torch.Tensor]:
        """Local name -> stored tensor of one matrix."""
        found = {}
        for name in self._by_module[f"{option.name}/{module}"]:
            found[name.rpartition(".")[2]] = _read(self._path, self._file, name)
        return found

    def put(self, block: Block, group: Group, option: Stored) -> None:
        """Gives a block the matrices that an engine computes with, and has it round inputs as it does."""
        if option.scheme is None:
            return
        for claim in group.claims:
            for part in claim.role.parts:
                tensors = self.local(option, part.module)
                block.put(part, option.scheme.decode(tensors, part.out_features, part.in_features))
                if option.scheme.rounds_inputs:
                    from compressor.stages.training import rounding

                    block.round_inputs(part, rounding(option.scheme, tensors))


class ChosenValues:
    """The values of the options that were chosen, as the stream would solve them: it need not do so again.

    Raises:
        CheckpointError: as ``Values``.
    """

    def __init__(self, folder: Path, chosen: Mapping[str, tuple[Group, Stored]]) -> None:
        blocks = {group.block for group, option in chosen.values() if option.scheme is not None}
        values = {block: Values(folder / values_name(block)) for block in blocks if block is not None}
        self._homes: dict[str, tuple[Values, Stored]] = {}
        self._errors: dict[tuple[str, str], PartError] = {}
        for receipt in all_receipts(folder):
            for error in (PartError(**error) for error in receipt["errors"]):
                self._errors[error.module, error.scheme] = error
        for group, option in chosen.values():
            for part in (part for claim in group.claims for part in claim.role.parts):
                if group.block in values and values[group.block].has(option, part.module):
                    self._homes[part.module] = (values[group.block], option)

    def __contains__(self, module: str) -> bool:
        return module in self._homes

    def local(self, module: str) -> dict[str, torch.Tensor]:
        """See ``Finished.local``."""
        values, option = self._homes[module]
        return values.local(option, module)

    def changed(self, name: str) -> torch.Tensor | None:
        """None: nothing else is changed."""
        return None

    def error(self, module: str) -> PartError:
        """See ``Finished.error``."""
        option = self._homes[module][1]
        assert option.scheme is not None
        return self._errors[module, option.scheme.label]


def _read(path: Path, file: FileHeader, name: str) -> torch.Tensor:
    return read_tensor(path, file.headers[name], file.offsets[name])


def is_solved(path: Path) -> bool:
    """Whether the file of a block is there and whole."""
    return read_receipt(path.parent, path.name) is not None and is_whole(path.parent, path.name)
