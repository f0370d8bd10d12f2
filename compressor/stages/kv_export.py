"""What the stage ``kv`` leaves, in a checkpoint's folder: plan, fold, and scales that engines read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressor.checkpoint.folded import FOLD_NAME
from compressor.checkpoint.safetensors_file import read_header
from compressor.checkpoint.safetensors_writer import shard_names
from compressor.dialects.base import Description, Dialect
from compressor.errors import CheckpointError
from compressor.kv.plan import JSON_NAME, TENSORS_NAME
from compressor.spec import TensorHeader
from compressor.stages.kv import SCALES_NAME

# Not weights: engines must not meet these files when they look for tensors.
ASIDE = (JSON_NAME, TENSORS_NAME, FOLD_NAME)


def scale_headers(kv: Path | None) -> list[TensorHeader]:
    """The static scales that the stage's folder holds; none without a folder."""
    if kv is None or not (kv / SCALES_NAME).is_file():
        return []
    return list(read_header(kv / SCALES_NAME).headers.values())


def kv_files(kv: Path | None) -> list[Path]:
    """The files that go beside the checkpoint's weights."""
    return [] if kv is None else [kv / name for name in ASIDE if (kv / name).is_file()]


def result_names(shards: int, *, scales: bool) -> tuple[list[str], str]:
    """Names of the weights' shards in the checkpoint, and of the one with the scales ("" without any).

    transformers reads a file ``model.safetensors`` alone, whatever an index says; so it must not be there
    beside another.
    """
    names = shard_names(shards + scales)
    return (names[:-1], names[-1]) if scales else (names, "")


def describe_kv(described: Description, dialect: Dialect, scales: Sequence[TensorHeader]) -> Description:
    """The description with the cache that static scales are for; as it is without any.

    Raises:
        CheckpointError: a scale that the dialect calls otherwise.
    """
    attentions = list(dict.fromkeys(header.name.partition(".self_attn.")[0] for header in scales))
    attentions = [f"{block}.self_attn" for block in attentions]
    expected = {name for module in attentions for name in dialect.kv_scales(module)}
    if {header.name for header in scales} != expected:
        raise CheckpointError("the static scales have other names", where=SCALES_NAME, fix="report it")
    return dialect.with_fp8_cache(described, attentions) if attentions else described
