"""What can be known of calibration texts before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compressor.calibration.formats import is_json_lines
from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.data import scan_text, text_bytes
from compressor.errors import UserError

_FIX = "name a text or .jsonl file that you may read"


def text_sha256(path: Path) -> str:
    """Hex sha256 of a text, which is read through once; of one packed by xz that of what it unpacks to.

    Raises:
        UserError: it is no ordinary file, of a format that is not read, empty, unreadable or not UTF-8.
    """
    if not path.is_file():
        raise UserError("the calibration text is not a file", where=str(path), fix=_FIX)
    is_json_lines(path)  # refuses other formats
    sha256, size = scan_text(path)
    if size == 0:
        raise UserError("the calibration text is empty", where=str(path), fix=_FIX)
    return sha256


def check_calibration(
    spec: CalibrationSpec, measured: Mapping[str, Path], longest: int | None
) -> list[UserError]:
    """What is wrong with a calibration whose files were found.

    Args:
        spec: of ``compressor.recipe.mixtures.calibration_spec``.
        measured: what source and result are measured on, which must be other texts, by what they are.
        longest: the model's positions, if they are known.

    Returns:
        Faults; their places are keys of the recipe.
    """
    faults = []
    if longest is not None and spec.sequence_length > longest:
        faults.append(
            UserError(
                f"rows of {spec.sequence_length} tokens are longer than the model's context of {longest}",
                where="calibration.sequence_length",
                fix=f"set it to {longest} at most",
            )
        )
    held_out = {scan_text(path)[0]: what for what, path in measured.items()}
    for index, (dataset, share) in enumerate(zip(spec.datasets, spec.shares, strict=True)):
        where = spec.place(index)
        if dataset.sha256 in held_out:
            faults.append(
                UserError(
                    f"{dataset.name} is {held_out[dataset.sha256]}: a model fitted to it measures nothing",
                    where=where,
                    fix="calibrate on another text",
                )
            )
        # Of whole rows, and without ``order()``, which takes seconds for a million of them.
        rows = int(round(share * spec.num_samples, 9))
        faults += _too_small(dataset, rows * spec.sequence_length, where)
    return faults


def _too_small(dataset: DatasetSpec, tokens: int, where: str) -> list[UserError]:
    """A fault where a file has not even half a byte for each token; the tokenizer counts exactly, later."""
    if dataset.path is None or tokens <= 2 * (size := text_bytes(dataset.path)):
        return []
    what = f"{dataset.name} has {size:,} bytes; its share of the calibration is {tokens:,} tokens"
    fix = "lower num_samples or sequence_length, or name more text"
    return [UserError(what, where=where, fix=fix)]
