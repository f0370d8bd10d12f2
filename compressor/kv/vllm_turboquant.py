"""Keys and values of vLLM 0.32's TurboQuant presets, byte for byte as its store kernel writes them.

Sources: ``vllm@0.32 v1/attention/ops/triton_turboquant_store.py`` (store), ``triton_turboquant_decode.py``
(read), ``v1/attention/backends/turboquant_attn.py`` (rotation) and ``model_executor/layers/quantization/
turboquant`` (centroids). A slot of vLLM is the key's slot, then the value's. ``turboquant_k8v4`` stores keys
as ``Fp8Codec`` does with scale 1.

vLLM takes norms and rotations by whatever BLAS there is; here they are computed row by row. A key that lies
within rounding of a boundary may get the neighbouring code.

Legend: N rows (a token in one KV head), D head_dim, S bytes of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from compressor.kv.rows import RowCodec, as_bytes, divided, from_bytes
from compressor.numerics.hadamard import fast_hadamard, is_power_of_two
from compressor.numerics.lloyd_max import level_values, midpoints, nearest_level
from compressor.numerics.packing import pack_bits, unpack_bits

_LEAST_NORM = 1e-8
_LEAST_SCALE = 1e-8
_LEAST_SQUARE = 1e-16
# vLLM's solver: rounds, the change that ends it, panels of the trapezoid rule, reach in standard deviations.
_ROUNDS, _TOLERANCE, _PANELS, _REACH, _FAR_REACH = 200, 1e-10, 200, 3.5, 10.5


class VllmTurboKeyCodec(RowCodec):
    """The unit vector, rotated by Hadamard / sqrt(D), as codes of a Gaussian's codebook; then its fp16 norm.

    What is read has exactly the stored norm, since levels are normalized again ("norm correction").

    Args:
        bits: of a code, 3 or 4.
    """

    kind = "vllm_turboquant_key"

    def __init__(self, bits: int) -> None:
        if bits not in (3, 4):
            raise ValueError(f"vLLM's TurboQuant keys have 3 or 4 bits, not {bits}")
        self._bits = bits

    def slot_bytes(self, head_dim: int) -> int:
        """Codes and norm."""
        return head_dim * self._bits // 8 + 2

    def problem(self, head_dim: int) -> str | None:
        """The rotation is a plain Hadamard matrix; 3-bit codes go by eights."""
        if not is_power_of_two(head_dim) or head_dim < 8:
            return f"a Hadamard rotation needs a head_dim that is a power of two from 8 on, not {head_dim}"
        return None

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S]."""
        x = x_ND.float()
        # fp64 holds the squares of fp32 and their sum to 1e-16: the order of the sum leaves no trace.
        norm = x.double().square().sum(dim=1, keepdim=True).sqrt().float()
        return self.encode_rotated(_rotate(x / (norm + _LEAST_NORM)), norm)

    def encode_rotated(self, y_ND: torch.Tensor, norm_N1: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S] of rotated unit vectors and norms, both fp32: what vLLM's kernel itself is given."""
        between = midpoints(vllm_levels(y_ND.shape[1], self._bits).to(y_ND.device))
        codes = nearest_level(y_ND, between)
        return torch.cat((pack_bits(codes, self._bits), as_bytes(norm_N1.half())), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        return _rotate(self.decode_rotated(slots_NS, head_dim))

    def decode_rotated(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D] before the rotation back, as vLLM's kernels read them."""
        size = head_dim * self._bits // 8
        levels = vllm_levels(head_dim, self._bits).to(slots_NS.device)
        y = level_values(unpack_bits(slots_NS[:, :size], self._bits), levels)
        y *= 1.0 / (y.square().sum(dim=1, keepdim=True) + _LEAST_SQUARE).sqrt()
        return y * from_bytes(slots_NS[:, size:], torch.float16)

    def options(self) -> Mapping[str, Any]:
        """The width."""
        return {"bits": self._bits}


class VllmTurboValueCodec(RowCodec):
    """Codes between a row's least and largest value, not rotated; then the step and the least value in fp16.

    Codes are chosen with the step in fp32, at least 1e-8.

    Args:
        bits: of a code, 3 or 4.
    """

    kind = "vllm_turboquant_value"

    def __init__(self, bits: int) -> None:
        if bits not in (3, 4):
            raise ValueError(f"vLLM's TurboQuant values have 3 or 4 bits, not {bits}")
        self._bits = bits

    def slot_bytes(self, head_dim: int) -> int:
        """Codes, step and least value."""
        return head_dim * self._bits // 8 + 4

    def problem(self, head_dim: int) -> str | None:
        """Codes fill whole bytes."""
        group = 8 if self._bits == 3 else 2
        return (
            f"{self._bits}-bit codes need a multiple of {group}, not {head_dim}" if head_dim % group else None
        )

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S]."""
        x = x_ND.float()
        most = float((1 << self._bits) - 1)
        least = x.amin(dim=1, keepdim=True)
        step = divided(x.amax(dim=1, keepdim=True) - least, most).clamp(min=_LEAST_SCALE)
        codes = ((x - least) / step + 0.5).clamp(0, most).to(torch.uint8)
        return torch.cat((pack_bits(codes, self._bits), as_bytes(torch.cat((step, least), 1).half())), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        size = head_dim * self._bits // 8
        step, least = torch.split(from_bytes(slots_NS[:, size:], torch.float16), 1, dim=1)
        return unpack_bits(slots_NS[:, :size], self._bits).float() * step + least

    def options(self) -> Mapping[str, Any]:
        """The width."""
        return {"bits": self._bits}


def _rotate(x_ND: torch.Tensor) -> torch.Tensor:
    """Sylvester's matrix / sqrt(D): orthogonal and symmetric, its own inverse."""
    return fast_hadamard(x_ND) * (1.0 / math.sqrt(x_ND.shape[1]))


@lru_cache(maxsize=32)
def vllm_levels(head_dim: int, bits: int) -> torch.Tensor:
    """fp32 [2**bits]: vLLM's centroids for N(0, 1 / head_dim), as its own solver rounds them.

    Lloyd's iteration from evenly spaced levels, with moments by a trapezoid rule of 200 panels between
    neighbouring midpoints; exact levels differ by up to 0.002 standard deviations.
    """
    variance = 1.0 / head_dim
    deviation = math.sqrt(variance)
    count = 1 << bits
    reach = _REACH * deviation
    panels = torch.arange(_PANELS + 1, dtype=torch.float64, device="cpu")
    levels = -reach + 2 * reach * (panels[:count] + 0.5) / count
    far = torch.full_like(panels[:1], _FAR_REACH * deviation)
    weights = torch.ones_like(panels)
    weights[0] = weights[-1] = 0.5
    for _ in range(_ROUNDS):
        edges = torch.cat((-far, midpoints(levels), far))
        x = edges[:-1, None] + panels * ((edges[1:] - edges[:-1]) / _PANELS)[:, None]
        density = torch.exp(-x * x / (2 * variance)) * weights
        mass = density.sum(dim=1)
        new = torch.where(mass > 0, (x * density).sum(dim=1) / mass, levels)
        moved = float((new - levels).abs().max())
        if moved < _TOLERANCE:
            break
        levels = new
    return levels.float()
