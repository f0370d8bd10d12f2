"""Puts a checkpoint folder together from finished shards and proves it against the claims, name by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from compressor.checkpoint.base import Source
from compressor.checkpoint.hf_config import quantization_config, result_config
from compressor.checkpoint.safetensors_file import read_header
from compressor.checkpoint.safetensors_writer import shard_names, write_index
from compressor.errors import CheckpointError
from compressor.model.families import text_config, tied
from compressor.model.names import expert_patterns, module_of
from compressor.schemes.base import Scheme
from compressor.stages.base import Claim, Shard
from compressor.workspace import write_json


def assemble(source: Source, shards: Sequence[Shard], streamed: Path, folder: Path) -> None:
    """Writes a complete checkpoint into ``folder``: shards (linked), index, config, side files.

    Raises:
        CheckpointError: the shards do not hold exactly what was claimed.
    """
    names = shard_names(len(shards))
    check_outputs(shards, [streamed / name for name in names])
    for name in names:
        link_or_copy(streamed / name, folder / name)
    write_index(
        folder,
        {
            name: [output.name for unit in shard.units for claim in unit.claims for output in claim.outputs]
            for name, shard in zip(names, shards, strict=True)
        },
        sum(shard.result_bytes for shard in shards),
    )
    source.write_side_files(folder)
    claims = [claim for shard in shards for unit in shard.units for claim in unit.claims]
    write_json(folder / "config.json", _config(source, claims))


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


def _config(source: Source, claims: Sequence[Claim]) -> dict[str, object]:
    by_scheme: dict[Scheme, list[str]] = {}
    left: list[str] = []
    fused_experts: list[str] = []
    ends = set()
    for claim in claims:
        modules = [part.module for part in claim.role.parts]
        if claim.scheme is not None:
            by_scheme.setdefault(claim.scheme, []).extend(modules)
            if claim.role.kind in ("embedding", "lm_head"):
                ends.update(modules)
        elif claim.role.kind in ("linear", "lm_head"):
            left += modules
        elif len(claim.tensor.shape) == 2 and claim.role.kind == "other":
            # Routers, vision towers: linear modules that the engine must not take for quantized ones.
            left.append(module_of(claim.tensor.name))
        elif len(claim.tensor.shape) == 3:
            fused_experts.append(claim.tensor.name)
    if tied(source.config, source.headers) and "lm_head" not in left:
        left.append("lm_head")
    # Engines rename the modules of models with towers, and map plain names only.
    exact = text_config(source.config) is not source.config
    quantization = quantization_config(
        by_scheme,
        left,
        frozenset(ends),
        exact=exact,
        ignored=expert_patterns(fused_experts, exact=exact),
    )
    narrowed = any(
        claim.action == "copy" and claim.outputs[0].dtype != claim.tensor.dtype for claim in claims
    )
    return result_config(source.config, quantization, narrowed=narrowed)
