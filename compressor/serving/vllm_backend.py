"""vLLM's classes for layers with packed slots. Imported only by the plug-in, inside vLLM."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

from compressor.serving.paged import Batch, PagedCodecs, attend, store


class PackedBackend(AttentionBackend):  # type: ignore[misc]
    """A cache [blocks, KV heads, tokens of a block, ``slot_bytes``]; ``backend_of`` makes one for a size."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    slot_bytes: ClassVar[int]

    @staticmethod
    def get_name() -> str:
        """vLLM looks names up among its own; this one is for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PackedImpl]:
        """What computes."""
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[PackedMetadataBuilder]:
        """What prepares a step."""
        return PackedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[Any]:
        """Any; 16 suits the backends of layers that are not packed."""
        return [MultipleOf(16)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The layer's spec with packed slots.

        vLLM 0.32 has a field for that; 0.26 a subclass, made for its own TurboQuant, of which only the slot's
        size is used. In both, a type of bytes keeps the layer apart from those in 16 bit.
        """
        if "state_content_bytes" in {field.name for field in fields(spec)}:
            return replace(spec, dtype=torch.uint8, state_content_bytes=cls.slot_bytes)
        from vllm.v1.kv_cache_interface import TQFullAttentionSpec

        return TQFullAttentionSpec(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=torch.uint8,
            tq_slot_size=cls.slot_bytes,
        )

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """What vLLM 0.26 asks; 0.32 takes the same shape from the spec."""
        return num_blocks, num_kv_heads, block_size, cls.slot_bytes


@functools.cache
def backend_of(slot_bytes: int) -> type[PackedBackend]:
    """The backend of layers with slots of this size: vLLM groups layers by their backend's name."""
    return type(f"PackedBackend{slot_bytes}", (PackedBackend,), {"slot_bytes": slot_bytes})


@dataclass
class PackedMetadata(AttentionMetadata):  # type: ignore[misc]
    """One step's batch."""

    batch: Batch


class PackedMetadataBuilder(AttentionMetadataBuilder[PackedMetadata]):  # type: ignore[misc]
    """No CUDA graphs: vLLM runs these layers between its graphs."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PackedMetadata:
        """The batch; sizes are brought to the host once a step."""
        asked = common_attn_metadata
        assert asked.causal is True, "packed layers are causal"
        count = asked.num_reqs
        starts = asked.query_start_loc_cpu[: count + 1].tolist()
        lengths = asked.seq_lens[:count].tolist()
        return PackedMetadata(Batch.of(starts, lengths, asked.block_table_tensor, asked.slot_mapping))


class PackedImpl(AttentionImpl[PackedMetadata]):  # type: ignore[misc]
    """Stores a step's keys and values, then attends to the cache: every key and value is read as stored."""

    supports_dcp = False  # slots hold whole tokens of one device

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        codecs: PagedCodecs,
    ) -> None:
        assert not alibi_slopes
        assert not logits_soft_cap
        assert sliding_window is None
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._shared = kv_sharing_target_layer_name is not None
        self._codecs = codecs

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: PackedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``output`` [tokens, heads, head_dim], written in place; rows beyond the batch are zero."""
        assert output_scale is None
        assert output_block_scale is None
        output.zero_()
        if attn_metadata is None:  # vLLM measures memory
            return output
        batch = attn_metadata.batch
        if not self._shared and key is not None and value is not None:
            store(kv_cache, self._codecs, key, value, batch)
        attend(kv_cache, self._codecs, query, batch, self.scale, output)
        return output
