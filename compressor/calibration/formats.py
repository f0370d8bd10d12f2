"""What a calibration file's name says of its format."""

from __future__ import annotations

from pathlib import Path

from compressor.data import text_suffix
from compressor.errors import UserError

_LINES = frozenset({".jsonl", ".ndjson"})
# Read as plain text, a model would be shown the syntax of these; packed files are no text at all.
_TABLES = frozenset({".json", ".csv", ".tsv", ".parquet", ".arrow"})
_PACKED = frozenset({".gz", ".bz2", ".zst", ".zip"})


def is_json_lines(path: Path) -> bool:
    """Whether each line is a JSON document (``.jsonl``, ``.ndjson``, in any case); else it is plain text.

    A text packed by xz (``.jsonl.xz``) is what it unpacks to.

    Raises:
        UserError: the suffix is that of a table or of a packed file.
    """
    suffix = text_suffix(path)
    if suffix in _PACKED:
        raise UserError(f"calibration does not read {suffix} files", where=str(path), fix="unpack it")
    if suffix in _TABLES:
        raise UserError(
            f"calibration does not read {suffix} files",
            where=str(path),
            fix="export it as .jsonl: one JSON object with a field `text` or `messages` a line",
        )
    return suffix in _LINES
