"""TurboQuant as the paper has it (Zandieh et al., arXiv 2504.19874), for our own cache.

A vector's norm is stored in fp16. The unit vector is rotated by a random orthogonal matrix, after which each
coordinate times sqrt(d) is close to N(0, 1) whatever the vector was, and is coded by that distribution's
exact Lloyd-Max levels. Rotations are taken in fp64: that is so much finer than what is stored that neither
the number of rows nor the BLAS leaves a trace in the codes.

Legend: B sequences, H KV heads, T tokens, D head_dim, N = B * H * T rows, d width of a part, S bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from compressor.kv.formats import split_bytes, split_norms, split_sizes
from compressor.kv.rows import RowCodec, as_bytes, from_bytes
from compressor.numerics.hadamard import fast_hadamard, gaussian_matrix, is_power_of_two, random_orthogonal
from compressor.numerics.lloyd_max import level_values, midpoints, nearest_level, rotated_levels
from compressor.numerics.packing import pack_bits, unpack_bits

Rotation = Literal["orthogonal", "hadamard"]

_NORM_BYTES = 2
_LARGEST_NORM = 65504.0  # of fp16
_LEAST_NORM = 1e-30


class _Turbo(RowCodec):
    """What the codecs of this file share.

    Args:
        bits: of a code.
        rotation: ``orthogonal`` as in the paper, or ``hadamard``: random signs, then Sylvester's matrix,
            faster, for widths that are powers of two.
        seed: of the rotation.
    """

    least_bits = 1

    def __init__(self, bits: int, *, rotation: Rotation = "orthogonal", seed: int = 0) -> None:
        if bits not in range(self.least_bits, 5):
            raise ValueError(f"{self.kind} has {self.least_bits} to 4 bits, not {bits}")
        if rotation not in get_args(Rotation):
            raise ValueError(f"rotations are {', '.join(get_args(Rotation))}, not {rotation!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"a seed lies between 0 and 2**32, not {seed}")
        self._bits = bits
        self._rotation: Rotation = rotation
        self._seed = seed

    def problem(self, head_dim: int) -> str | None:
        """Codes fill whole bytes; Hadamard's matrices have sizes that are powers of two."""
        if head_dim % 8:
            return f"{self.kind} needs a head_dim that is a multiple of 8, not {head_dim}"
        if self._rotation == "hadamard" and not is_power_of_two(head_dim):
            return f"a Hadamard rotation needs a head_dim that is a power of two, not {head_dim}"
        return None

    def options(self) -> Mapping[str, Any]:
        """Width, rotation and its seed."""
        return {"bits": self._bits, "rotation": self._rotation, "seed": self._seed}

    def _rotate(self, unit_Nd: torch.Tensor) -> torch.Tensor:
        """fp32 [N, d] of about N(0, 1): rotated unit vectors times sqrt(d)."""
        width = unit_Nd.shape[1]
        if self._rotation == "hadamard":
            return fast_hadamard(unit_Nd * _signs(width, self._seed).to(unit_Nd.device))
        matrix = random_orthogonal(width, self._seed).to(unit_Nd.device)
        return (unit_Nd.double() @ matrix * math.sqrt(width)).float()

    def _rotate_back(self, y_Nd: torch.Tensor) -> torch.Tensor:
        """The inverse of ``_rotate``."""
        width = y_Nd.shape[1]
        if self._rotation == "hadamard":
            return fast_hadamard(y_Nd) * (_signs(width, self._seed) / width).to(y_Nd.device)
        matrix = random_orthogonal(width, self._seed).to(y_Nd.device)
        return (y_Nd.double() @ matrix.T / math.sqrt(width)).float()


class TurboMseCodec(_Turbo):
    """Codes of ``bits`` bits, then the norm: least squared error (the paper's algorithm 1)."""

    kind = "turboquant_mse"

    def slot_bytes(self, head_dim: int) -> int:
        """Codes and norm."""
        return head_dim * self._bits // 8 + _NORM_BYTES

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S]."""
        unit, norm = _unit(x_ND)
        return torch.cat((pack_bits(_codes(self._rotate(unit), self._bits), self._bits), norm), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        size = head_dim * self._bits // 8
        y = _levels_of(unpack_bits(slots_NS[:, :size], self._bits), self._bits)
        return self._rotate_back(y) * from_bytes(slots_NS[:, size:], torch.float16)


class TurboProdCodec(_Turbo):
    """Codes of ``bits - 1`` bits, the signs of a random projection of what they leave over, two norms.

    Inner products with what is decoded are right on average over projections (the paper's algorithm 2, QJL),
    at a larger squared error than ``TurboMseCodec`` with as many bits. The second norm is that of the rest
    of the unit vector.
    """

    kind = "turboquant_prod"
    least_bits = 2

    def slot_bytes(self, head_dim: int) -> int:
        """Codes, signs and both norms."""
        return head_dim * self._bits // 8 + 2 * _NORM_BYTES

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S]."""
        unit, norm = _unit(x_ND)
        y = self._rotate(unit)
        codes = _codes(y, self._bits - 1)
        rest = (y - _levels_of(codes, self._bits - 1)) * (1 / math.sqrt(y.shape[1]))
        projection = self._projection(y)
        signs = (rest.double() @ projection.T >= 0).to(torch.uint8)
        parts = (pack_bits(codes, self._bits - 1), pack_bits(signs, 1), norm, as_bytes(_norm(rest).half()))
        return torch.cat(parts, dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        sizes = [head_dim * (self._bits - 1) // 8, head_dim // 8, _NORM_BYTES, _NORM_BYTES]
        codes, signs, norm, rest_norm = torch.split(slots_NS, sizes, dim=1)
        y = _levels_of(unpack_bits(codes, self._bits - 1), self._bits - 1)
        towards = unpack_bits(signs, 1).double() * 2 - 1
        scale = math.sqrt(math.pi / 2) / math.sqrt(head_dim)  # of y, which is sqrt(d) times the unit vector
        y += (towards @ self._projection(y) * scale).float() * from_bytes(rest_norm, torch.float16)
        return self._rotate_back(y) * from_bytes(norm, torch.float16)

    def _projection(self, like_Nd: torch.Tensor) -> torch.Tensor:
        return _gaussian(like_Nd.shape[1], self._seed).to(like_Nd.device)


class TurboSplitCodec(_Turbo):
    """A quarter of the coordinates with ``bits + 1`` bits, the others with ``bits``: 2.5 and 3.5 bits.

    From head_dim 128 on two groups of channels are coded apart, each with a rotation and a norm of its own
    (the paper's section 4.3): 32 channels and 96 at head_dim 128. A shorter vector has one rotation and one
    norm: at head_dim 64, 16 of the rotated coordinates and 48.

    Args:
        bits: of a code of the larger group, 1 to 3.
        outliers: int64 [H, D / 4] or [D / 4], the channels of the smaller group for each KV head or for all,
            as ``outlier_channels`` finds them; None for the first quarter. Only where there are two norms.
        rotation: as for the others; the larger group's width is not a power of two, so from head_dim 128 on
            only ``orthogonal``.
        seed: of the rotations.
    """

    kind = "turboquant_split"

    def __init__(
        self,
        bits: int,
        outliers: torch.Tensor | None = None,
        *,
        rotation: Rotation = "orthogonal",
        seed: int = 0,
    ) -> None:
        super().__init__(bits, rotation=rotation, seed=seed)
        if bits > 3:
            raise ValueError(f"{self.kind} has 1 to 3 bits and a half, not {bits}")
        if outliers is not None and (outliers.dtype != torch.int64 or outliers.ndim not in (1, 2)):
            raise ValueError("outlier channels are int64 [channels] or [KV heads, channels]")
        self._outliers = outliers
        if outliers is not None and outliers.ndim == 2 and len(outliers) != 1:
            self.kv_heads = len(outliers)
        self._many = TurboMseCodec(bits + 1, rotation=rotation, seed=seed)
        self._few = TurboMseCodec(bits, rotation=rotation, seed=seed + 1)

    def slot_bytes(self, head_dim: int) -> int:
        """Codes and norms."""
        return split_bytes(head_dim, self._bits)

    def problem(self, head_dim: int) -> str | None:
        """Both groups fill whole bytes; chosen channels are for head_dims with two norms."""
        if head_dim % 32:
            return f"{self.kind} needs a head_dim that is a multiple of 32, not {head_dim}"
        if split_norms(head_dim) == 1:
            chosen = "a vector with one norm is rotated as a whole and has no outlier channels"
            return super().problem(head_dim) if self._outliers is None else chosen
        if self._outliers is not None and not _are_channels(self._outliers, head_dim):
            return f"outlier channels are {split_sizes(head_dim)[0]} different ones of {head_dim}"
        return None if self._rotation == "orthogonal" else f"{self.kind} needs rotation orthogonal here"

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, T, S] of float keys or values [B, H, T, D], on their device."""
        if self._outliers is not None:
            order = self._order(x_BHTD.shape[1], x_BHTD.shape[-1]).to(x_BHTD.device)
            x_BHTD = x_BHTD.gather(-1, order.expand_as(x_BHTD))
        return super().encode(x_BHTD)

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, D] in ``dtype`` of what ``encode`` made."""
        x_BHTD = super().decode(slots_BHTS, head_dim, dtype)
        if self._outliers is not None:
            back = self._order(x_BHTD.shape[1], head_dim).argsort(-1).to(x_BHTD.device)
            x_BHTD = x_BHTD.gather(-1, back.expand_as(x_BHTD))
        return x_BHTD

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S] of rows whose first quarter is the smaller group."""
        many, _ = split_sizes(x_ND.shape[1])
        if split_norms(x_ND.shape[1]) == 2:
            return torch.cat(
                (self._many.encode_rows(x_ND[:, :many]), self._few.encode_rows(x_ND[:, many:])), dim=1
            )
        unit, norm = _unit(x_ND)
        y = self._rotate(unit)
        bits = self._bits
        # Codebooks of the whole vector: its coordinates were rotated together.
        high, low = _codes(y, bits + 1)[:, :many], _codes(y, bits)[:, many:]
        return torch.cat((pack_bits(high, bits + 1), pack_bits(low, bits), norm), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D], the smaller group first."""
        many, few = split_sizes(head_dim)
        if split_norms(head_dim) == 2:
            size = self._many.slot_bytes(many)
            parts = (
                self._many.decode_rows(slots_NS[:, :size], many),
                self._few.decode_rows(slots_NS[:, size:], few),
            )
            return torch.cat(parts, dim=1)
        bits = self._bits
        sizes = [many * (bits + 1) // 8, few * bits // 8, _NORM_BYTES]
        high, low, norm = torch.split(slots_NS, sizes, dim=1)
        y = torch.cat(
            (
                _values(unpack_bits(high, bits + 1), bits + 1, head_dim),
                _values(unpack_bits(low, bits), bits, head_dim),
            ),
            dim=1,
        )
        return self._rotate_back(y) * from_bytes(norm, torch.float16)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The outlier channels, where they were chosen."""
        return {} if self._outliers is None else {"outliers": self._outliers}

    def _order(self, heads: int, head_dim: int) -> torch.Tensor:
        """int64 [H or 1, 1, D]: outlier channels, then the others in order."""
        assert self._outliers is not None
        outliers = self._outliers.reshape(-1, self._outliers.shape[-1])
        if len(outliers) not in (1, heads):
            raise ValueError(f"outlier channels of {len(outliers)} KV heads for {heads}")
        place = torch.full((len(outliers), head_dim), head_dim, device=outliers.device)
        place.scatter_(
            1, outliers, torch.arange(outliers.shape[1], device=outliers.device).expand_as(outliers)
        )
        return place.argsort(dim=1, stable=True)[:, None]


def outlier_channels(x_BHTD: torch.Tensor) -> torch.Tensor:
    """int64 [H, D / 4], ascending: the channels of each KV head with the largest mean square."""
    square_HD = x_BHTD.double().square().mean(dim=(0, 2))
    count, _ = split_sizes(x_BHTD.shape[-1])
    return square_HD.topk(count, dim=1).indices.sort(dim=1).values


def _are_channels(outliers: torch.Tensor, head_dim: int) -> bool:
    rows = outliers.reshape(-1, outliers.shape[-1])
    if rows.shape[1] != split_sizes(head_dim)[0] or bool(((rows < 0) | (rows >= head_dim)).any()):
        return False
    return bool((rows.sort(dim=1).values.diff(dim=1) > 0).all())


def _norm(x_Nd: torch.Tensor) -> torch.Tensor:
    """fp32 [N, 1]; fp64 holds squares of fp32 and their sum to 1e-16."""
    return x_Nd.double().square().sum(dim=1, keepdim=True).sqrt().float()


def _unit(x_Nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [N, d] of length 1 (or 0), and the norm's bytes, uint8 [N, 2]; norms stop at fp16's largest."""
    x = x_Nd.float()
    norm = _norm(x)
    return x / norm.clamp(min=_LEAST_NORM), as_bytes(norm.clamp(max=_LARGEST_NORM).half())


def _codes(y_Nd: torch.Tensor, bits: int) -> torch.Tensor:
    return nearest_level(y_Nd, midpoints(_levels(bits, y_Nd.shape[1]).to(y_Nd.device)))


def _levels_of(codes_Nd: torch.Tensor, bits: int) -> torch.Tensor:
    return _values(codes_Nd, bits, codes_Nd.shape[1])


def _values(codes_Nd: torch.Tensor, bits: int, dimensions: int) -> torch.Tensor:
    return level_values(codes_Nd, _levels(bits, dimensions).to(codes_Nd.device))


@lru_cache(maxsize=64)
def _levels(bits: int, dimensions: int) -> torch.Tensor:
    return torch.tensor(rotated_levels(bits, dimensions), dtype=torch.float32, device="cpu")


@lru_cache(maxsize=16)
def _signs(width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(2, (width,), generator=generator, device="cpu").float() * 2 - 1


@lru_cache(maxsize=16)
def _gaussian(width: int, seed: int) -> torch.Tensor:
    # Another stream than the rotation's of the same seed.
    return gaussian_matrix(width, seed + 2**32)
