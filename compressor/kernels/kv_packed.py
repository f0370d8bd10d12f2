"""What the kernels of a packed KV cache are told about its bytes. Importing this does not import triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["codebook", "affine", "zero_point", "e4m3"]


@dataclass(frozen=True)
class Packed:
    """How keys or values are packed: codes from the lowest bit up, then what scales them, little-endian.

    Attributes:
        kind: ``codebook``: codes of levels, then a norm in fp16, which what is read has exactly;
            ``affine``: even steps from a least value, step and least value in fp16;
            ``zero_point``: even steps in fp32, the zero point in the step's 4 lowest bits;
            ``e4m3``: codes alone.
        bits: of a code.
        levels: of a codebook, ascending; in any unit, since they are normalized when they are read.
        rotated: the codes are those of a vector times the signs and then a Hadamard matrix.
        factor: of the Hadamard matrix of ones.
        signs: one for each coordinate; empty for none.
    """

    kind: Kind
    bits: int
    levels: tuple[float, ...] = ()
    rotated: bool = False
    factor: float = 1.0
    signs: tuple[float, ...] = ()

    @property
    def scale_bytes(self) -> int:
        """Bytes after the codes."""
        return {"codebook": 2, "affine": 4, "zero_point": 4, "e4m3": 0}[self.kind]

    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of one token in one KV head."""
        return head_dim * self.bits // 8 + self.scale_bytes
