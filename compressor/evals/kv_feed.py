"""Feeding texts to a model through a cache, chunk by chunk.

One forward pass over a text says nothing about a cache that leaves its first chunk raw. So texts are fed in
chunks, each of which attends to what the cache gives back of those before:

- mode ``strict``: a chunk's own keys and values come back as stored too. A slot depends on its own token
  only, so chunks of any size read what decoding token by token would read. Where a recent window stays in 16
  bit, a chunk's early queries see up to its size fewer raw tokens: chunks are then an eighth of the window,
  and the figures a little worse than decoding one by one, never better.
- mode ``vllm``: the first half is one raw chunk, as a prompt is prefilled; what follows comes in chunks of up
  to ``CHUNK_TOKENS``, which vLLM's TurboQuant reads wholly from the cache, as it reads when it decodes.

Legend: R texts at once, T tokens of a text, P tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHUNK_TOKENS = 128
RECENT_CHUNKS = 8  # of a recent window
# What is alive at once: tokens in all caches of one format, and float32 logits of a step.
CACHED_TOKENS = 16384
STEP_TOKENS = 1024
LOGIT_BYTES = 256 * 2**20

PROBE_TOKENS = 16

Mode = Literal["strict", "vllm"]

# () -> an empty transformers cache that counts its bytes (kv.base.CountedCache).
MakeCache = Callable[[], Any]


@dataclass(frozen=True)
class KvVariant:
    """A KV-cache format to measure.

    Attributes:
        name: of the format.
        make: makes its empty cache.
        recent_tokens: the longest 16-bit window of recent tokens in any of its layers.
    """

    name: str
    make: MakeCache
    recent_tokens: int = 0

    @property
    def chunk_tokens(self) -> int:
        """How many tokens may be fed at once."""
        return max(1, self.recent_tokens // RECENT_CHUNKS) if self.recent_tokens else CHUNK_TOKENS


def feed(
    model: PreTrainedModel,
    ids_RT: torch.Tensor,
    cache: Any,
    chunk: int,
    *,
    prefill: int = 0,
    wanted: int = 0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Feeds texts to the model chunk by chunk, the first ``prefill`` tokens in one.

    Yields:
        The position that the first logits belong to, and logits [R, P, V]: of the last position alone for
        the prefill and for chunks that end before position ``wanted``, else of the whole chunk.
    """
    length = ids_RT.shape[1]
    starts = [*([0] if prefill else []), *range(prefill, length, chunk)]
    for start, stop in pairwise([*starts, length]):
        last_only = start < prefill or stop <= wanted
        logits_RPV = step(model, ids_RT[:, start:stop], cache, last_only=last_only)
        yield stop - logits_RPV.shape[1], logits_RPV


def step(
    model: PreTrainedModel, ids_RP: torch.Tensor, cache: Any, *, last_only: bool = False
) -> torch.Tensor:
    """Logits [R, P, V] in float32 of a chunk that follows what the cache holds; or [R, 1, V] of its last."""
    import torch

    with torch.inference_mode():
        found = model(
            ids_RP.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=int(last_only)
        )
        logits: torch.Tensor = found.logits.float()
        return logits


def texts_at_once(length: int, chunk: int) -> int:
    """How many texts of ``length`` tokens fit in one batch."""
    return max(1, min(CACHED_TOKENS // length, STEP_TOKENS // chunk))


def fitting_chunk(chunk: int, vocabulary: int) -> int:
    """``chunk``, or fewer tokens where the logits of so many would not fit."""
    return max(1, min(chunk, LOGIT_BYTES // (4 * vocabulary)))


def continues_in_chunks(model: PreTrainedModel, ids_T: torch.Tensor, usual: MakeCache) -> bool:
    """Whether a chunk of several tokens may follow another: some models keep states for single tokens only.

    Tried on a few tokens against one forward pass (transformers 5.17's Jamba forgets its Mamba state).
    """
    import torch

    probe_1T = ids_T[None, :PROBE_TOKENS]
    cache = usual()
    parts = [logits for _, logits in feed(model, probe_1T, cache, PROBE_TOKENS // 2)]
    whole = step(model, probe_1T, usual())
    # Rounding in 16-bit models; a lost state moves logits by their own size.
    return bool(torch.dist(torch.cat(parts, dim=1), whole) <= 0.05 * whole.norm())
