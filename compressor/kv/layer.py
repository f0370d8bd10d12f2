"""One attention layer's cache as packed bytes.

Nothing decoded is kept: every step decodes what it reads and drops it, so that the memory held between two
steps is ``nbytes``, and the memory of a step one layer's keys and values more. A decoded copy would make
steps faster and the cache larger than the 16-bit one that it replaces.

Legend: B sequences, H KV heads, T tokens, D head_dim, S bytes of a slot, N any last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.cache_utils import CacheLayerMixin

from compressor.errors import UserError
from compressor.kv.base import KvCodec

Mode = Literal["strict", "vllm"]

CONTINUATION_TOKENS = 128
"""vLLM's TurboQuant reads chunks up to this long wholly from the cache (vLLM 0.32,
v1/attention/backends/turboquant_attn.py, ``_CONTINUATION_DECODE_THRESHOLD``)."""

_FIRST_TOKENS = 16  # slots allocated at least
_GROWTH = 1.5  # a full buffer grows by: half is copied for each token, and a third of it is free at most


@dataclass(frozen=True)
class LayerCodecs:
    """How one attention layer is stored.

    Attributes:
        keys: codec of the keys, as attention reads them (after RoPE).
        values: codec of the values.
        sink_tokens: first positions of every sequence that stay in 16 bit; with left padding, the padding
            counts.
        recent_tokens: last positions that stay in 16 bit.
    """

    keys: KvCodec
    values: KvCodec
    sink_tokens: int = 0
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        assert self.sink_tokens >= 0
        assert self.recent_tokens >= 0


class _Growing:
    """Tokens [B, H, T, N] in a buffer that is larger than they are, so that appending one is cheap."""

    def __init__(self, like_BHTN: torch.Tensor) -> None:
        self._buffer = like_BHTN[:, :, :0]
        self.tokens = 0

    def append(self, new_BHTN: torch.Tensor) -> None:
        needed = self.tokens + new_BHTN.shape[2]
        if needed > self._buffer.shape[2]:
            capacity = max(needed, int(self._buffer.shape[2] * _GROWTH), _FIRST_TOKENS)
            batch, heads, _, width = new_BHTN.shape
            larger = new_BHTN.new_empty(batch, heads, capacity, width)
            larger[:, :, : self.tokens] = self.held()
            self._buffer = larger
        self._buffer[:, :, self.tokens : needed] = new_BHTN
        self.tokens = needed

    def held(self) -> torch.Tensor:
        """What was appended; a view."""
        return self._buffer[:, :, : self.tokens]

    def drop_last(self, tokens: int) -> None:
        self.tokens -= tokens

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._buffer = change(self._buffer)

    def nbytes(self) -> int:
        return self.held().numel() * self._buffer.element_size()

    def allocated_nbytes(self) -> int:
        return self._buffer.nbytes


class _Side:
    """Keys, or values: the sink in 16 bit, then slots, then the recent window in 16 bit."""

    def __init__(
        self, codec: KvCodec, first_BHTD: torch.Tensor, sink_tokens: int, recent_tokens: int
    ) -> None:
        self._codec = codec
        self._head_dim = first_BHTD.shape[-1]
        self._dtype = first_BHTD.dtype
        # What computes in float32 here is kept in 16 bit by every engine.
        self._stored_dtype = self._dtype if self._dtype.itemsize == 2 else torch.bfloat16
        self._sink_tokens, self._recent_tokens = sink_tokens, recent_tokens
        self._sink = first_BHTD[:, :, :0].to(self._stored_dtype)
        self._slots: _Growing | None = None
        self._recent = self._sink

    def append(self, new_BHTD: torch.Tensor) -> None:
        room = self._sink_tokens - self._sink.shape[2]
        if room > 0:
            self._sink = torch.cat([self._sink, new_BHTD[:, :, :room].to(self._stored_dtype)], dim=2)
            new_BHTD = new_BHTD[:, :, room:]
        if self._recent_tokens == 0:
            self._pack(new_BHTD)
            return
        raw_BHTD = torch.cat([self._recent, new_BHTD.to(self._stored_dtype)], dim=2)
        leaving = max(0, raw_BHTD.shape[2] - self._recent_tokens)
        self._pack(raw_BHTD[:, :, :leaving])
        # A copy: a view would keep the tokens that left.
        self._recent = raw_BHTD[:, :, leaving:].clone()

    def _pack(self, x_BHTD: torch.Tensor) -> None:
        if x_BHTD.shape[2] == 0:
            return
        first = self._sink.shape[2] + (self._slots.tokens if self._slots else 0)
        slots_BHTS = self._codec.encode_at(x_BHTD, first)
        assert slots_BHTS.dtype == torch.uint8
        assert slots_BHTS.shape[-1] == self._codec.slot_bytes(self._head_dim), type(self._codec).__name__
        if self._slots is None:
            self._slots = _Growing(slots_BHTS)
        self._slots.append(slots_BHTS)

    def read(self) -> torch.Tensor:
        """[B, H, T, D] of everything stored, in the dtype of what came in."""
        parts = [self._sink.to(self._dtype)]
        if self._slots is not None:
            first = self._sink.shape[2]
            parts.append(self._codec.decode_at(self._slots.held(), self._head_dim, self._dtype, first))
        return torch.cat([*parts, self._recent.to(self._dtype)], dim=2)

    def drop_last(self, tokens: int) -> None:
        """Forgets the last ``tokens``; there is no recent window."""
        packed = 0 if self._slots is None else min(tokens, self._slots.tokens)
        if self._slots is not None:
            self._slots.drop_last(packed)
        kept = self._sink.shape[2] - (tokens - packed)
        self._sink = self._sink[:, :, :kept].clone()

    def change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._sink, self._recent = change(self._sink), change(self._recent)
        if self._slots is not None:
            self._slots.change_batch(change)

    def nbytes(self) -> int:
        return self._sink.nbytes + self._recent.nbytes + (self._slots.nbytes() if self._slots else 0)

    def allocated_nbytes(self) -> int:
        packed = self._slots.allocated_nbytes() if self._slots else 0
        return self._sink.nbytes + self._recent.nbytes + packed


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of full attention that keeps slots of ``LayerCodecs``.

    What attention is given for a chunk of tokens:

    - ``strict``: everything as stored, the chunk's own keys and values too: as a kernel reads that stores
      first and then attends to the cache. vLLM's FP8, INT8, INT4 and NVFP4 caches are read so.
    - ``vllm``: as vLLM 0.32's TurboQuant reads. The first chunk of a sequence raw; a later one of more than
      ``CONTINUATION_TOKENS`` raw after what is stored; a shorter one, decoding among them, as ``strict``.

    The 16-bit window of ``recent_tokens`` ends at a chunk's last token: its earlier queries see fewer raw
    tokens than they would one by one, never more.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, codecs: LayerCodecs, mode: Mode) -> None:
        super().__init__()
        self.codecs = codecs
        self.mode = mode
        # Rolling back would leave tokens packed that had not been.
        self.is_croppable = codecs.recent_tokens == 0
        self._forget()

    def _forget(self) -> None:
        self._sides: tuple[_Side, _Side] | None = None
        self._tokens = 0
        self.is_initialized = False
        self.largest_read_nbytes = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes head sizes, dtype and device from the first keys and values."""
        sizes = (self.codecs.sink_tokens, self.codecs.recent_tokens)
        self._sides = (
            _Side(self.codecs.keys, key_states, *sizes),
            _Side(self.codecs.values, value_states, *sizes),
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a chunk [B, H, T, D] and returns the keys and values that it attends to."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._sides is not None
        chunk = key_states.shape[2]
        raw = self.mode == "vllm" and chunk > (CONTINUATION_TOKENS if self._tokens else 1)
        read = []
        for side, new_BHTD in zip(self._sides, (key_states, value_states), strict=True):
            if raw:
                read.append(torch.cat([side.read(), new_BHTD], dim=2) if self._tokens else new_BHTD)
                side.append(new_BHTD)
            else:
                side.append(new_BHTD)
                read.append(side.read())
        self._tokens += chunk
        self.largest_read_nbytes = max(self.largest_read_nbytes, sum(part.nbytes for part in read))
        return read[0], read[1]

    def nbytes(self) -> int:
        """Bytes of the tokens held: slots, and 16-bit tokens at 2 bytes an element."""
        return sum(side.nbytes() for side in self._sides or ())

    def allocated_nbytes(self) -> int:
        """The same with the room that buffers have grown to."""
        return sum(side.allocated_nbytes() for side in self._sides or ())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a chunk of ``query_length`` attends to."""
        return self._tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._tokens

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forgets everything and gives its memory back."""
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a positive number is the length to keep, as in transformers 5.17.

        Raises:
            UserError: there is a recent window in 16 bit, which cannot be put back as it was.
        """
        if not self.is_croppable:
            raise UserError(
                "a KV cache with a recent window in 16 bit cannot be rolled back",
                fix="assisted generation needs a format without recent_tokens",
            )
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self._tokens - tokens_to_remove
        removed = min(removed, self._tokens)
        if removed <= 0 or self._sides is None:
            return
        for side in self._sides:
            side.drop_last(removed)
        self._tokens -= removed

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence b becomes what sequence ``beam_idx[b]`` was (beam search)."""
        self._change_batch(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._change_batch(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the sequences ``indices``."""
        self._change_batch(lambda held: held[indices.to(held.device)])

    def _change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for side in self._sides or ():
            side.change_batch(change)

    def offload(self) -> None:
        """Packed layers stay where they are."""

    def prefetch(self) -> None:
        """Packed layers stay where they are."""
