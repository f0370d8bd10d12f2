"""How a checkpoint spells what schemes store: one file for each dialect, and the table of all."""

from __future__ import annotations

from compressor.dialects.base import Dialect, DialectName
from compressor.dialects.compressed_tensors import CompressedTensors
from compressor.dialects.modelopt import ModelOpt

__all__ = ["DIALECTS"]

DIALECTS: dict[DialectName, Dialect] = {
    dialect.name: dialect for dialect in (CompressedTensors(), ModelOpt())
}
