"""Receipts: written after a file of finished tensors; that there is one means that the file is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compressor.schemes.base import Scheme
from compressor.solvers.base import Solved
from compressor.spec import LinearPart
from compressor.workspace import file_sha256, write_json


@dataclass(frozen=True)
class PartError:
    """How far one stored matrix is from its source.

    Attributes:
        module: the matrix.
        scheme: how it is stored.
        squared_error: sum of (decoded - weight)^2.
        squared_norm: sum of weight^2.
        parameters: its weights.
        solver: whose values were stored, where calibration chose between them; else None.
        output_error: relative squared error of the layer's output on the calibration tokens, or None.
        rtn_output_error: the same of plain round to nearest, or None.
        tokens: how many calibration tokens reached the matrix, or None.
        topped_up: how many more it was solved on, which the router sent to other experts.
        note: why another solver's values were stored than asked for, or None.
    """

    module: str
    scheme: str
    squared_error: float
    squared_norm: float
    parameters: int
    solver: str | None = None
    output_error: float | None = None
    rtn_output_error: float | None = None
    tokens: int | None = None
    note: str | None = None
    topped_up: int = 0

    @classmethod
    def of(
        cls, part: LinearPart, scheme: Scheme, solved: Solved, rows: int | None, topped_up: int = 0
    ) -> PartError:
        """The errors of a matrix that was solved on so many ``rows``, ``topped_up`` of them not its own."""
        return cls(
            module=part.module,
            scheme=scheme.label,
            squared_error=solved.squared_error,
            squared_norm=solved.squared_norm,
            parameters=part.out_features * part.in_features,
            solver=solved.used,
            output_error=solved.output_error,
            rtn_output_error=solved.rtn_output_error,
            tokens=None if rows is None else rows - topped_up,
            note=solved.note,
            topped_up=topped_up,
        )

    def learned(self, squared_error: float, squared_norm: float) -> PartError:
        """The same for values learned from these; the errors of the output stay those of the start."""
        name = "learned" if self.solver == "rtn" else f"{self.solver}+learned"
        return replace(self, solver=name, squared_error=squared_error, squared_norm=squared_norm)


@dataclass(frozen=True)
class BlockError:
    """How near a block whose matrices were learned together came to the source's output.

    On the calibration sequences that were held out: squared error of the block's output over its squared
    norm, outlying tokens weighted down. The source's output is the one that the source itself computes.

    Attributes:
        name: path of its module.
        before: as the start solver stored the matrices, or None where nothing was measured.
        after: as they are stored; ``before`` where learning made nothing better, so that the start's stand.
        tokens: held out.
        skipped: why nothing was learned, or None.
    """

    name: str
    before: float | None = None
    after: float | None = None
    tokens: int = 0
    skipped: str | None = None

    @property
    def is_better(self) -> bool:
        """Whether what was learned is to be used."""
        return self.before is not None and self.after is not None and self.after < self.before


@dataclass(frozen=True)
class Coverage:
    """How many calibration tokens the experts of one module were sent.

    Attributes:
        name: path of the module.
        enough: tokens without which an expert is starved.
        tokens: of each expert.
        topped_up: of each expert: other experts' tokens that it was solved on as well.
        scored: whether those are the ones that the router scored highest, as far as any were needed; else
            its scores could not be heard.
        shared_range: whether a scale of inputs was stored for all of them, of what any of them heard.
    """

    name: str
    enough: int
    tokens: tuple[int, ...]
    topped_up: tuple[int, ...]
    scored: bool
    shared_range: bool

    @property
    def starved(self) -> int:
        """How many experts were sent too few."""
        return sum(tokens < self.enough for tokens in self.tokens)

    @property
    def never_reached(self) -> int:
        """How many experts were sent none."""
        return self.tokens.count(0)


def write_receipt(
    folder: Path,
    name: str,
    errors: Sequence[PartError],
    block: BlockError | None = None,
    smoothing: Mapping[str, Any] | None = None,
    experts: Sequence[Coverage] = (),
) -> None:
    """Writes the receipt of the finished file ``name``: its hash, and the errors of what is in it.

    ``block``: what learning the block did, where it was asked for; ``smoothing``: the same of smoothing it
    (``Smoother.facts``); ``experts``: what they were sent, where there are any.
    """
    receipt: dict[str, Any] = {"sha256": file_sha256(folder / name)}
    receipt["errors"] = [asdict(error) for error in errors]
    if block is not None:
        receipt["block"] = asdict(block)
    if smoothing is not None:
        receipt["smoothing"] = smoothing
    if experts:
        receipt["experts"] = [asdict(coverage) for coverage in experts]
    write_json(_path(folder, name), receipt)


def read_receipt(folder: Path, name: str) -> dict[str, Any] | None:
    """The receipt of a file (``sha256``, ``errors``, perhaps ``block``), or None where it is not finished."""
    path = _path(folder, name)
    if not path.is_file() or not (folder / name).is_file():
        return None
    receipt: dict[str, Any] = json.loads(path.read_text())
    return receipt


def is_whole(folder: Path, name: str) -> bool:
    """Whether a file is finished, and still what it was when its receipt was written."""
    receipt = read_receipt(folder, name)
    return receipt is not None and bool(file_sha256(folder / name) == receipt["sha256"])


def drop_receipt(folder: Path, name: str) -> None:
    """Makes a file count as unfinished."""
    _path(folder, name).unlink(missing_ok=True)


def all_receipts(folder: Path) -> list[dict[str, Any]]:
    """The receipts of a finished stage's files, in order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.safetensors.json"))]


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
