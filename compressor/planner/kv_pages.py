"""The bytes that vLLM 0.32 takes for the cache of one sequence: whole blocks, of one pool, for every layer.

Follows ``vllm/platforms/interface.py`` (block sizes), ``v1/core/kv_cache_utils.py`` (groups and pages) and
``v1/kv_cache_interface.py`` (blocks of a sequence). Where all layers need the same blocks, as in dense models
without windows, each layer has its own page size and nothing is padded but the last block. Where they do
not, all layers share one page size, the largest, and groups of equally many layers take blocks in turn.
A sliding layer is counted once its window is full, without the tokens of a prompt in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

_KERNEL_BLOCK = 16  # tokens; the default block, and what backends take multiples of
_LATENT_BLOCK = 64  # FlashMLA's only kernel block
_EVEN = 1.5  # groups are padded to the larger number of layers up to here


@dataclass(frozen=True)
class PagedLayer:
    """One layer as the engine sees it.

    Attributes:
        kind: ``full``, ``sliding``, ``chunked``, ``latent`` or ``state``.
        token_bytes: of one token, all heads; of a state, of one sequence.
        elements: of one token's keys and values, all heads; 0 for states.
        quantized: whether the layer has the cache's format, not 16 bit.
        window: tokens of a window or chunk.
    """

    kind: str
    token_bytes: int
    elements: int
    quantized: bool
    window: int | None = None


@dataclass(frozen=True)
class _Page:
    """Layers of one specification: tokens of a block, bytes of a page, blocks of the sequence."""

    layer: PagedLayer
    block: int
    page_bytes: int
    padded: bool = False

    def blocks(self, tokens: int) -> int:
        layer = self.layer
        if layer.kind == "state":
            return 1
        if layer.window is None:
            return _up(tokens, self.block)
        if layer.kind == "chunked":
            return _up(min(layer.window, tokens), self.block)
        # The window need not start with a block.
        return _up(min(layer.window - 1, tokens), self.block) + 1


def paged_bytes(layers: Sequence[PagedLayer], tokens: int) -> int | None:
    """Bytes of the blocks of one sequence of ``tokens`` tokens; None where vLLM 0.32 finds no common page."""
    block, shared, state = _block_size(layers)
    pages = [_page(layer, block, shared, state) for layer in layers]
    if len({(page.layer.kind == "full", page.layer.kind, page.layer.window) for page in pages}) == 1:
        return max(page.blocks(tokens) for page in pages) * sum(page.page_bytes for page in pages)
    largest = max(page.page_bytes for page in pages)
    unified = [_unified(page, largest) for page in pages]
    if any(page is None for page in unified):
        return None
    counts = Counter(page for page in unified if page is not None)
    size = min(counts.values())
    if max(counts.values()) < size * _EVEN:
        size = max(counts.values())
    blocks = sum(_up(count, size) * page.blocks(tokens) for page, count in counts.items())
    return blocks * size * largest


def _block_size(layers: Sequence[PagedLayer]) -> tuple[int, int | None, int | None]:
    """Tokens of a block; the page that 16-bit layers beside quantized ones share; the page of states."""
    attention = [layer for layer in layers if layer.kind != "state"]
    base = _LATENT_BLOCK if any(layer.kind == "latent" for layer in attention) else _KERNEL_BLOCK
    if not attention:
        return base, None, None
    quantized = next((layer for layer in attention if layer.quantized), attention[0])
    plain = next((layer for layer in attention if not layer.quantized), quantized)
    states = [layer.token_bytes for layer in layers if layer.kind == "state"]
    block, state = base, None
    if states:
        token = lcm(quantized.token_bytes, plain.token_bytes)
        block = base * _up(max(states), base * token)
        state = block * token
    if quantized.token_bytes == plain.token_bytes:
        return block, None, state
    # The first layer's backend is asked what a token of the format takes: a 16-bit layer's has bytes in mind.
    primary = quantized.token_bytes if attention[0].quantized else quantized.elements
    required = max(plain.token_bytes * _KERNEL_BLOCK, state or 0)
    block = max(block, max(base, block) * _up(required, max(base, block) * primary))
    shared = block * primary
    return block, shared, shared if state is not None else None


def _page(layer: PagedLayer, block: int, shared: int | None, state: int | None) -> _Page:
    if layer.kind == "state":
        return _Page(layer, block, state if state is not None else layer.token_bytes)
    if layer.kind == "sliding" and shared is not None:
        fitting = shared // layer.token_bytes // _KERNEL_BLOCK * _KERNEL_BLOCK
        return _Page(layer, max(fitting, _KERNEL_BLOCK), shared, padded=True)
    return _Page(layer, block, block * layer.token_bytes)


def _unified(page: _Page, largest: int) -> _Page | None:
    """The page at the common size; None where it was padded already and a larger block no longer fits it."""
    if page.page_bytes == largest:
        return page
    if page.layer.kind != "state" and largest % page.page_bytes == 0:
        grown = page.block * (largest // page.page_bytes)
        return None if page.padded else replace(page, block=grown, page_bytes=largest)
    return replace(page, page_bytes=largest, padded=True)


def _up(count: int, unit: int) -> int:
    return -(-count // unit)
