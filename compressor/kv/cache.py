"""A transformers cache whose full-attention layers hold packed bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from compressor.errors import CheckpointError, UserError
from compressor.kv.base import KvFormat
from compressor.kv.layer import LayerCodecs, Mode, PackedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "LayerCodecs",
    "Mode",
    "PackedCache",
    "full_attention_layers",
    "head_sizes",
    "spared_layers",
    "uniform_layers",
]

_ENGINE_BYTES = 2  # of an element of keys and values that are not packed


class PackedCache(DynamicCache):  # type: ignore[misc]
    """``DynamicCache`` of a model with some of its full-attention layers replaced by ``PackedLayer``.

    Sliding and chunked attention (Gemma, gpt-oss, Llama 4), linear attention (Qwen3-Next), convolutions and
    Mamba keep transformers' own layers in 16 bit: what they hold does not grow with the text beyond their
    window. vLLM 0.32 would quantize sliding and chunked layers too; it keeps sliding ones in 16 bit with
    ``--kv-cache-dtype-skip-layers sliding_window``, chunked ones where their numbers are listed.

    ``model.generate(past_key_values=...)`` works as with ``DynamicCache``: greedy, sampling, beams, left
    padding, and assisted generation where no layer has a recent window.
    """

    @classmethod
    def of(
        cls, config: PreTrainedConfig, layers: Mapping[int, LayerCodecs], mode: Mode = "strict"
    ) -> PackedCache:
        """An empty cache for a model with this configuration.

        Args:
            config: of the model; one with a vision tower is told by its text part.
            layers: how layers are stored, by the number of their decoder block; the others stay in 16 bit.
            mode: what attention reads, see ``PackedLayer``.

        Raises:
            CheckpointError: multi-head latent attention.
            UserError: a layer without full attention, or heads that a codec cannot store.
        """
        known = full_attention_layers(config)
        _, head_dim = head_sizes(config)
        for number, codecs in layers.items():
            if number not in known:
                raise UserError(
                    f"layer {number} has no full attention to pack",
                    fix=f"layers with full attention: {', '.join(map(str, known)) or 'none'}",
                )
            for what, codec in (("keys", codecs.keys), ("values", codecs.values)):
                problem = head_dim and codec.problem(head_dim)
                if problem:
                    raise UserError(f"the {what} of layer {number} cannot be packed: {problem}")
        made = cls(config=config)
        for number, codecs in layers.items():
            made.layers[number] = PackedLayer(codecs, mode)
        return made

    def nbytes(self) -> int:
        """Bytes of everything held: exact for packed layers; recurrent states as they are.

        Keys and values of layers left alone count 2 bytes an element, as an engine holds them, also where
        the model computes in float32.
        """
        return sum(_nbytes(layer) for layer in self.layers)

    def allocated_nbytes(self) -> int:
        """The same with the room that the packed layers' buffers have grown to."""
        return self.nbytes() + sum(layer.allocated_nbytes() - layer.nbytes() for layer in self._packed())

    def peak_nbytes(self) -> int:
        """What is allocated, and the decoded keys and values of one layer: the most that any step read.

        A codec's own intermediate values are not counted.
        """
        return self.allocated_nbytes() + max(
            (layer.largest_read_nbytes for layer in self._packed()), default=0
        )

    def _packed(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """Numbers of the decoder blocks whose keys and values can be packed.

    Raises:
        CheckpointError: multi-head latent attention.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise CheckpointError(
            f"{text.model_type} has multi-head latent attention: its cache is one latent vector a token, "
            "already compressed, for which there is no packed format here or in vLLM 0.32",
            fix="leave the KV cache of this model in 16 bit",
        )
    # Subclasses are sliding, indexed or hybrid layers.
    return [
        number
        for number, layer in enumerate(DynamicCache(config=config).layers)
        if type(layer) is DynamicLayer
    ]


def uniform_layers(config: PreTrainedConfig, kv_format: KvFormat) -> dict[int, LayerCodecs]:
    """One format for every layer that can be packed, but for those that vLLM keeps in 16 bit for it.

    Raises:
        CheckpointError: multi-head latent attention.
        UserError: no layer has full attention, the format is fitted, or it cannot hold heads of this size.
    """
    layers = full_attention_layers(config)
    if not layers:
        raise UserError(
            f"no layer of this model has full attention: {kv_format.name} would store nothing",
            fix="leave the KV cache of this model in 16 bit",
        )
    if kv_format.make is None:
        raise UserError(
            f"{kv_format.name} is fitted to a model: it has no codecs of its own", fix="name its plan"
        )
    _, head_dim = head_sizes(config)
    problem = head_dim and kv_format.problem(head_dim)
    if problem:
        raise UserError(problem, fix="name a format that holds such heads")
    spared = spared_layers(config, kv_format)
    keys, values = kv_format.make()
    return {number: LayerCodecs(keys, values) for number in layers if number not in spared}


def spared_layers(config: PreTrainedConfig, kv_format: KvFormat) -> frozenset[int]:
    """Layers with full attention that vLLM 0.32 keeps in 16 bit with this format, whatever it is told.

    It counts decoder blocks of every kind, and spares at most half of them
    (model_executor/layers/quantization/turboquant/config.py, ``get_boundary_skip_layers``).

    Raises:
        CheckpointError: multi-head latent attention.
    """
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers):
        return frozenset()
    blocks = config.get_text_config(decoder=True).num_hidden_layers
    ends = min(kv_format.skips_ends, blocks // 2)
    return frozenset(number for number in full_attention_layers(config) if not ends <= number < blocks - ends)


def head_sizes(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """KV heads of a layer, and elements of a head, where the configuration tells them."""
    text = config.get_text_config(decoder=True)
    hidden, heads, kv_heads, head_dim = (
        getattr(text, name, None)
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if not isinstance(head_dim, int):
        head_dim = hidden // heads if hidden and heads else None
    return kv_heads if isinstance(kv_heads, int) else None, head_dim


def _nbytes(layer: Any) -> int:
    if isinstance(layer, PackedLayer):
        return layer.nbytes()
    sides = (getattr(layer, name, None) for name in ("keys", "values"))
    states = [
        state
        for kind in ("conv_states", "recurrent_states")
        for state in (getattr(layer, kind, None) or {}).values()
        if state is not None
    ]
    kept: int = sum(
        side.numel() * min(side.element_size(), _ENGINE_BYTES) for side in sides if side is not None
    )
    return kept + sum(int(state.nbytes) for state in states)
