"""Puts a checkpoint folder together from finished shards and proves it against the claims, name by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from compressor.checkpoint.base import Source
from compressor.checkpoint.hf_config import result_config
from compressor.checkpoint.safetensors_file import read_header
from compressor.checkpoint.safetensors_writer import shard_names, write_index
from compressor.dialects.base import Description, Dialect
from compressor.errors import CheckpointError
from compressor.model.aliases import linear_aliases
from compressor.stages.base import Shard
from compressor.stages.kv import SCALES_NAME
from compressor.stages.kv_export import describe_kv, kv_files, result_names, scale_headers
from compressor.stages.modules import modules_of
from compressor.workspace import write_json


def assemble(
    source: Source,
    shards: Sequence[Shard],
    dialect: Dialect,
    streamed: Path,
    folder: Path,
    kv: Path | None = None,
) -> None:
    """Writes a complete checkpoint into ``folder``: shards (linked), index, configs, side files.

    ``kv``: folder of the stage before the weights, whose plan and scales are added.

    Raises:
        CheckpointError: the shards do not hold exactly what was claimed, or a source tensor is in none.
    """
    names = shard_names(len(shards))
    check_sources(source, shards)
    check_outputs(shards, [streamed / name for name in names])
    scales, beside = scale_headers(kv), kv_files(kv)
    results, scales_name = result_names(len(shards), scales=bool(scales))
    for name, result in zip(names, results, strict=True):
        link_or_copy(streamed / name, folder / result)
    for file in beside:
        link_or_copy(file, folder / file.name)
    contents = {
        name: [output.name for unit in shard.units for claim in unit.claims for output in claim.outputs]
        for name, shard in zip(results, shards, strict=True)
    }
    if kv is not None and scales:
        link_or_copy(kv / SCALES_NAME, folder / scales_name)
        contents[scales_name] = [header.name for header in scales]
    total = sum(shard.result_bytes for shard in shards) + sum(header.nbytes for header in scales)
    write_index(folder, contents, total)
    source.write_side_files(folder)
    claims = [claim for shard in shards for unit in shard.units for claim in unit.claims]
    described = Description({}, {})
    if any(claim.stored is not None for claim in claims):
        described = dialect.describe(modules_of(source, claims, linear_aliases(source)))
        described = describe_kv(described, dialect, scales)
    narrowed = any(
        claim.action == "copy" and claim.outputs[0].dtype != claim.tensor.dtype for claim in claims
    )
    config = result_config(source.config, described.quantization_config, narrowed=narrowed)
    for name, content in ({"config.json": config} | dict(described.files)).items():
        write_json(folder / name, content)


def check_sources(source: Source, shards: Sequence[Shard]) -> None:
    """Raises CheckpointError unless every tensor of the source becomes a tensor of some shard."""
    kept = {
        claim.tensor.name
        for shard in shards
        for unit in shard.units
        for claim in unit.claims
        if claim.outputs
    }
    lost = sorted(source.headers.keys() - kept)
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensor(s) of the source would be missing from the result: {', '.join(lost[:4])}",
            where=source.label,
            fix="report it",
        )


def check_outputs(shards: Sequence[Shard], files: Sequence[Path]) -> None:
    """Raises CheckpointError unless every claimed output, and nothing else, is in its shard as claimed."""
    for shard, file in zip(shards, files, strict=True):
        claimed = {
            output.name: output for unit in shard.units for claim in unit.claims for output in claim.outputs
        }
        written = read_header(file).headers
        differing = [
            name for name in claimed.keys() | written.keys() if claimed.get(name) != written.get(name)
        ]
        if differing:
            shown = ", ".join(sorted(differing)[:4])
            raise CheckpointError(
                f"{len(differing)} tensor(s) are not as the plan claimed them: {shown}",
                where=str(file),
                fix="run again with --fresh; if it comes back, report it",
            )


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
