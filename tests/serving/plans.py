"""Plans of small models for tests of serving."""

from __future__ import annotations

import torch

from compressor.kv.fitted import CENTROIDS, FittedCodec
from compressor.kv.formats import FORMATS
from compressor.kv.plan import KvPlan, LayerPlan


def layer_plan(name: str, kv_heads: int, head_dim: int) -> LayerPlan:
    """A layer in one of ``FORMATS``."""
    make = FORMATS[name].make
    assert make is not None
    keys, values = make()
    return LayerPlan(name, kv_heads, head_dim, keys, values)


def fitted_codec(kv_heads: int, head_dim: int, byte_of: int, seed: int = 0) -> FittedCodec:
    """A fitted codec of random rotation and centroids; ``byte_of`` coordinates share a byte."""
    elements = kv_heads * head_dim
    generator = torch.Generator().manual_seed(seed)
    turn_EE = torch.linalg.qr(torch.randn(elements, elements, generator=generator))[0]
    return FittedCodec(
        kv_heads=kv_heads,
        head_dim=head_dim,
        mean=0.1 * torch.randn(elements, generator=generator),
        forward=turn_EE,
        backward=turn_EE.T.contiguous(),
        groups=torch.arange(elements) // byte_of,
        centroids=torch.randn(CENTROIDS, elements, generator=generator),
    )


def mixed_plan(kv_heads: int, head_dim: int) -> KvPlan:
    """Four layers: 3.5 bit, 2.5 bit, 16 bit, fitted."""
    fitted = [fitted_codec(kv_heads, head_dim, byte_of, seed) for seed, byte_of in enumerate((2, 4))]
    return KvPlan(
        {
            0: layer_plan("turboquant_3.5bit", kv_heads, head_dim),
            1: layer_plan("turboquant_2.5bit", kv_heads, head_dim),
            2: LayerPlan("bf16", kv_heads, head_dim),
            3: LayerPlan("fitted", kv_heads, head_dim, *fitted),
        }
    )
