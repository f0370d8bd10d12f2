"""GPUs by name: memory, bandwidth and dense arithmetic as their vendors' data sheets state them.

Memory in decimal GB, as sold. Where sheets print rates with sparsity, these are without: half of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressor.schemes.base import Arithmetic


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as recipes spell it.
        memory_bytes: that it has.
        bandwidth: of its memory, bytes a second.
        flops: format of both factors -> dense operations a second; what it lacks is not there.
        source: where the figures are from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: Mapping[Arithmetic, float]
    source: str

    def rate(self, arithmetic: Arithmetic) -> float:
        """Operations a second; of a format that the GPU lacks those of bf16: engines decode to it."""
        return self.flops.get(arithmetic, self.flops["bf16"])


def _gpu(name: str, gigabytes: float, terabytes_s: float, source: str, *, bf16: float, **tera: float) -> Gpu:
    """A GPU with rates in 1e12 operations a second."""
    flops: dict[Arithmetic, float] = {"bf16": bf16 * 1e12}
    for arithmetic in ("fp8", "int8", "fp4"):
        if arithmetic in tera:
            flops[arithmetic] = tera[arithmetic] * 1e12
    return Gpu(name, int(gigabytes * 1e9), terabytes_s * 1e12, flops, source)


_TABLE = (
    _gpu("l4", 24, 0.300, "NVIDIA L4 data sheet", bf16=121, fp8=242.5, int8=242.5),
    _gpu("rtx-4090", 24, 1.008, "NVIDIA Ada GPU architecture, appendix A", bf16=165.2, fp8=330.3, int8=660.6),
    _gpu("l40s", 48, 0.864, "NVIDIA L40S data sheet", bf16=362.05, fp8=733, int8=733),
    _gpu("a100-80gb", 80, 2.039, "NVIDIA A100 data sheet, SXM", bf16=312, int8=624),
    _gpu("h100-80gb", 80, 3.35, "NVIDIA H100 data sheet, SXM", bf16=989.5, fp8=1979, int8=1979),
    _gpu("h200-141gb", 141, 4.8, "NVIDIA H200 data sheet, SXM", bf16=989.5, fp8=1979, int8=1979),
    _gpu(
        "b200-180gb",
        180,
        8.0,
        "NVIDIA DGX B200 data sheet, an eighth",
        bf16=2250,
        fp8=4500,
        int8=4500,
        fp4=9000,
    ),
    _gpu("mi300x", 192, 5.3, "AMD Instinct MI300X data sheet", bf16=1307.4, fp8=2614.9, int8=2614.9),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}
DEFAULT_GPU = "h100-80gb"
