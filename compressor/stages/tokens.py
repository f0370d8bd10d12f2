"""The calibration tokens of a walk: made once, kept with the stage, so that a rerun meets the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import (
    FileHeader,
    read_header,
    read_tensor,
    safetensors_dtype,
)
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import CheckpointError
from compressor.model.families import family_for, text_config
from compressor.progress import Progress
from compressor.spec import TensorHeader
from compressor.workspace import write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_FILE = "tokens.safetensors"
_NAME = "ids"
_PROMPT = "prompt"


@dataclass(frozen=True, eq=False)
class Shown:
    """What a walk is shown.

    Attributes:
        ids_NT: int64 token ids, one full sequence a row.
        counts: tokens by dataset.
        prompts: conversations with images, as the source's processor makes them (``Tape.record``).
    """

    ids_NT: torch.Tensor
    counts: dict[str, int]
    prompts: tuple[dict[str, torch.Tensor], ...] = ()


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
        prompts = _stored_prompts(path, file)
        _check_all(ids_NT, prompts, source)
        # Files of earlier versions hold no warnings.
        for warning in json.loads(file.metadata.get("warnings", "[]")):
            progress.warn(warning)
        return Shown(ids_NT, json.loads(file.metadata["counts"]), prompts)
    made = load_tokens(calibration, source_tokenizer(source, folder), progress)
    prompts, counts, warnings = _prompts(source, calibration, folder, progress)
    _check_all(made.ids_NT, prompts, source)
    counts = made.counts | counts
    metadata = {"counts": json.dumps(counts), "warnings": json.dumps([*made.warnings, *warnings])}
    tensors = {_NAME: made.ids_NT}
    for number, prompt in enumerate(prompts):
        tensors |= {f"{_PROMPT}.{number}.{name}": tensor for name, tensor in prompt.items()}
    headers = [
        TensorHeader(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    with ShardWriter(path, headers, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.contiguous())
    return Shown(made.ids_NT, counts, prompts)


def _prompts(
    source: Source, calibration: CalibrationSpec, folder: Path, progress: Progress
) -> tuple[tuple[dict[str, torch.Tensor], ...], dict[str, int], list[str]]:
    """The prompts with images, their tokens by file, and warnings."""
    images = calibration.images
    if images is None:
        return (), {}, []
    from compressor.calibration.images import image_prompts

    processor = source_processor(source, folder)
    prompts, warnings = image_prompts(
        images, processor, calibration.sequence_length, calibration.seed, progress
    )
    for warning in warnings:
        progress.warn(warning)
    return tuple(prompts), {images.name: sum(prompt["input_ids"].numel() for prompt in prompts)}, warnings


def _stored_prompts(path: Path, file: FileHeader) -> tuple[dict[str, torch.Tensor], ...]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, header in file.headers.items():
        if name != _NAME:
            _, number, key = name.split(".", 2)
            found.setdefault(int(number), {})[key] = read_tensor(path, header, file.offsets[name])
    return tuple(found[number] for number in sorted(found))


def _check_all(ids_NT: torch.Tensor, prompts: Sequence[Mapping[str, torch.Tensor]], source: Source) -> None:
    for ids in (ids_NT, *(prompt["input_ids"] for prompt in prompts)):
        check_ids(ids, source)


def check_ids(ids_NT: torch.Tensor, source: Source) -> None:
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


def source_processor(source: Source, near: Path) -> Any:
    """The processor of images and texts that belongs to the source; ``near`` is as for the tokenizer.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """
    from compressor.model.load import load_processor

    near.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="processor.tmp-", dir=near) as folder:
        source.write_side_files(Path(folder))
        write_json(Path(folder) / "config.json", source.config)
        return load_processor(Path(folder), source.label)
