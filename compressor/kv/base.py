"""What a codec and a format of the KV cache are. Importing this does not import torch: plans need it.

Legend: B sequences, H KV heads, T tokens, D head_dim, S bytes of a slot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch

Tier = Literal["vllm", "own", "research"]
"""Who serves a format: vLLM 0.32 with a launch flag; our own cache; the same with fitted transforms."""


class KvCodec(ABC):
    """How the keys, or the values, of one layer are stored: a slot of bytes for each token and KV head.

    A slot depends on its own token and its place in the sequence only, so that a cache can be written token
    by token. What was fitted to a layer (scales, rotations, codebooks) belongs to the codec, not to the
    slots: its bytes do not grow with the number of tokens.

    Attributes:
        kind: the codec's name in ``kv_plan.json``.
        places: whether slots depend on a token's place: then ``encode_at`` and ``decode_at`` are to be used.
        kv_heads: how many it was fitted to; None for any number.
    """

    kind: ClassVar[str]
    places: ClassVar[bool] = False
    kv_heads: int | None = None

    @abstractmethod
    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of one token in one KV head, scales and norms included."""

    @abstractmethod
    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, T, S] of float keys or values [B, H, T, D], on their device."""

    @abstractmethod
    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, D] in ``dtype`` of what ``encode`` made."""

    def encode_at(self, x_BHTD: torch.Tensor, first: int) -> torch.Tensor:
        """The same for tokens the first of which is number ``first`` of its sequence, as caches count."""
        del first
        return self.encode(x_BHTD)

    def decode_at(
        self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype, first: int
    ) -> torch.Tensor:
        """What ``encode_at`` made, decoded."""
        del first
        return self.decode(slots_BHTS, head_dim, dtype)

    def problem(self, head_dim: int) -> str | None:
        """Why heads of this size cannot be stored so, in words for the user; None where they can."""
        del head_dim
        return None

    def options(self) -> Mapping[str, Any]:
        """What makes the codec again, but for ``tensors``: plain JSON values, arguments of its class."""
        return {}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What was fitted, by name; arguments of its class too. Empty for codecs that are not fitted."""
        return {}


@dataclass(frozen=True)
class KvFormat:
    """A codec for the keys and one for the values.

    Attributes:
        name: in recipes; vLLM's own ``--kv-cache-dtype`` where ``tier`` is ``vllm``.
        tier: who can serve it.
        key_bytes: head_dim -> bytes of the key slot.
        value_bytes: head_dim -> bytes of the value slot.
        make: () -> the codecs of keys and of values; for formats that are fitted, None.
        power_of_two: whether head_dim must be a power of two.
        multiple_of: what must divide head_dim, so that codes fill whole bytes and blocks.
        skips_ends: how many of the first, and as many of the last, attention layers vLLM keeps in 16 bit
            where the model is dense (not a hybrid), whatever its flags say.
        note: a sentence for plan and card.
    """

    name: str
    tier: Tier
    key_bytes: Callable[[int], int]
    value_bytes: Callable[[int], int]
    make: Callable[[], tuple[KvCodec, KvCodec]] | None
    power_of_two: bool = False
    multiple_of: int = 1
    skips_ends: int = 0
    note: str = ""

    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of one token in one KV head, keys and values, scales and norms included."""
        return self.key_bytes(head_dim) + self.value_bytes(head_dim)

    def bits(self, head_dim: int) -> float:
        """Bits of one element, over keys and values, scales and norms included."""
        return 8 * self.slot_bytes(head_dim) / (2 * head_dim)

    def problem(self, head_dim: int) -> str | None:
        """Why heads of this size cannot be stored so; None where they can."""
        if self.power_of_two and head_dim & (head_dim - 1):
            return f"{self.name} needs a head_dim that is a power of two (Hadamard rotation), not {head_dim}"
        if head_dim % self.multiple_of:
            return f"{self.name} needs a head_dim that is a multiple of {self.multiple_of}, not {head_dim}"
        return None


class CountedCache(Protocol):
    """A transformers cache that knows its size: what evaluation sees of ``PackedCache``."""

    def nbytes(self) -> int:
        """Bytes of everything held."""

    def peak_nbytes(self) -> int:
        """Bytes allocated, and what the largest step read decoded."""
