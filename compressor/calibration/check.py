"""What can be known of calibration texts before any model is loaded."""

from __future__ import annotations

import codecs
import hashlib
from pathlib import Path

from compressor.calibration.formats import is_json_lines
from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.errors import UserError
from compressor.workspace import file_sha256

_CHUNK_BYTES = 8 << 20
_FIX = "name a text or .jsonl file that you may read"


def text_sha256(path: Path) -> str:
    """Hex sha256 of a text, which is read through once.

    Raises:
        UserError: it is no ordinary file, of a format that is not read, empty, unreadable or not UTF-8.
    """
    if not path.is_file():
        raise UserError("the calibration text is not a file", where=str(path), fix=_FIX)
    is_json_lines(path)  # refuses other formats
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                decoder.decode(chunk)
                position += len(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # Counted from what the decoder had held back of the chunk before.
        begin = position - (len(error.object) - len(chunk))
        what = f"not UTF-8 text (byte {begin + error.start})"
        raise UserError(what, where=str(path), fix="convert it, with iconv for example") from error
    except OSError as error:
        what = f"the text cannot be read: {error.strerror}"
        raise UserError(what, where=str(path), fix=_FIX) from error
    if position == 0:
        raise UserError("the calibration text is empty", where=str(path), fix=_FIX)
    return digest.hexdigest()


def check_calibration(
    spec: CalibrationSpec, evaluation_text: Path | None, longest: int | None
) -> list[UserError]:
    """What is wrong with a calibration whose files were found.

    Args:
        spec: of ``compressor.recipe.mixtures.calibration_spec``.
        evaluation_text: what source and result are measured on, which must be another text.
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
    held_out = file_sha256(evaluation_text) if evaluation_text is not None else None
    for index, (dataset, share) in enumerate(zip(spec.datasets, spec.shares, strict=True)):
        where = spec.place(index)
        if dataset.sha256 is not None and dataset.sha256 == held_out:
            faults.append(
                UserError(
                    f"{dataset.name} is the evaluation text: a model fitted to it measures nothing there",
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
    if dataset.path is None or tokens <= 2 * (size := dataset.path.stat().st_size):
        return []
    what = f"{dataset.name} has {size:,} bytes; its share of the calibration is {tokens:,} tokens"
    fix = "lower num_samples or sequence_length, or name more text"
    return [UserError(what, where=where, fix=fix)]
