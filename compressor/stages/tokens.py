"""The calibration tokens of a walk: made once, kept with the stage, so that a rerun meets the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import CheckpointError
from compressor.model.families import family_for, text_config
from compressor.progress import Progress
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_FILE = "tokens.safetensors"
_NAME = "ids"


@dataclass(frozen=True, eq=False)
class Shown:
    """What a walk is shown: int64 token ids, one full sequence a row; and tokens by dataset."""

    ids_NT: torch.Tensor
    counts: dict[str, int]


def calibration_tokens(
    source: Source, calibration: CalibrationSpec, folder: Path, progress: Progress
) -> Shown:
    """The tokens that ``folder`` holds, or new ones, which it then holds; warns of the same either way.

    Raises:
        CheckpointError: the source has no tokenizer that transformers can load, or one that makes ids which
            its embedding has no rows for.
        UserError: a text cannot be read, or is too short; the disk is full.
    """
    from compressor.calibration.tokens import load_tokens

    path = folder / _FILE
    if path.is_file():
        file = read_header(path)
        ids_NT = read_tensor(path, file.headers[_NAME], file.offsets[_NAME])
        _check_ids(ids_NT, source)
        # Files of earlier versions hold no warnings.
        for warning in json.loads(file.metadata.get("warnings", "[]")):
            progress.warn(warning)
        return Shown(ids_NT, json.loads(file.metadata["counts"]))
    made = load_tokens(calibration, source_tokenizer(source, folder), progress)
    _check_ids(made.ids_NT, source)
    metadata = {"counts": json.dumps(made.counts), "warnings": json.dumps(made.warnings)}
    header = TensorHeader(_NAME, "I64", tuple(made.ids_NT.shape))
    with ShardWriter(path, [header], metadata) as writer:
        writer.write(_NAME, made.ids_NT)
    return Shown(made.ids_NT, made.counts)


def _check_ids(ids_NT: torch.Tensor, source: Source) -> None:
    """Refuses ids beyond the embedding, which a forward pass would end in an index error at."""
    rows, largest = _embedding_rows(source), int(ids_NT.max())
    if rows is not None and largest >= rows:
        raise CheckpointError(
            f"the tokenizer makes id {largest:,}, but the embedding has {rows:,} rows",
            where=source.label,
            fix="use the tokenizer that belongs to the weights",
        )


def _embedding_rows(source: Source) -> int | None:
    """Rows of the input embedding as its header has them, else as config.json says; None if neither does."""
    family = family_for(source.config)
    roles = [family.role(header, source.config) for header in source.headers.values()]
    rows = [role.parts[0].out_features for role in roles if role.kind == "embedding"]
    if rows:
        return max(rows)
    stated = text_config(source.config).get("vocab_size")
    return stated if type(stated) is int else None


def source_tokenizer(source: Source, near: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a result of this source gets; ``near`` is a folder for temporary files.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """
    from compressor.model.load import load_tokenizer

    near.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="tokenizer.tmp-", dir=near) as folder:
        source.write_side_files(Path(folder))
        return load_tokenizer(Path(folder))
