"""Paged attention against each sequence alone, in the open: stored, read back, and one softmax a query."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.kv.fitted_rotary import RotaryFittedCodec
from compressor.kv.formats import FORMATS
from compressor.kv.plan import LayerPlan
from compressor.serving import paged
from compressor.serving.paged import Batch, PagedCodecs, attend, store
from tests.serving.plans import fitted_codec, layer_plan

HEADS, KV_HEADS, HEAD_DIM, BLOCK, BLOCKS = 6, 2, 32, 4, 64
SCALE = 0.3


def mixed() -> PagedCodecs:
    """Keys and values in slots of unlike size."""
    plan = layer_plan("turboquant_3.5bit", KV_HEADS, HEAD_DIM)
    return PagedCodecs.of(
        LayerPlan("mixed", KV_HEADS, HEAD_DIM, plan.keys, fitted_codec(KV_HEADS, HEAD_DIM, 2))
    )


def turned() -> PagedCodecs:
    """Keys whose slots depend on their places."""
    fitted = fitted_codec(KV_HEADS, HEAD_DIM, 4)
    keys = RotaryFittedCodec.of(fitted, torch.tensor([1.0, 0.3, 0.02]))
    return PagedCodecs.of(LayerPlan("turned", KV_HEADS, HEAD_DIM, keys, fitted))


class Engine:
    """Hands out blocks in no order and steps through sequences, as vLLM does."""

    def __init__(self, codecs: PagedCodecs, sequences: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.codecs = codecs
        # Whatever was in memory: 255 is NaN in fp8 and in fp16.
        self.cache = torch.full((BLOCKS, KV_HEADS, BLOCK, codecs.slot_bytes), 255, dtype=torch.uint8)
        self.free = torch.randperm(BLOCKS, generator=self.generator).tolist()
        self.blocks: list[list[int]] = [[] for _ in range(sequences)]
        self.seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(sequences)]

    def step(self, new: list[int], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(what ``attend`` gives, what it should give) for so many new tokens of each sequence."""
        starts, lengths, slots = [0], [], []
        query = torch.randn(sum(new) + padding, HEADS, HEAD_DIM, generator=self.generator)
        keys, values = torch.randn(2, sum(new) + padding, KV_HEADS, HEAD_DIM, generator=self.generator)
        for number, count in enumerate(new):
            for token in range(starts[-1], starts[-1] + count):
                at = len(self.seen[number])
                if at % BLOCK == 0:
                    self.blocks[number].append(self.free.pop())
                slots.append(self.blocks[number][at // BLOCK] * BLOCK + at % BLOCK)
                self.seen[number].append((keys[token], values[token]))
            starts.append(starts[-1] + count)
            lengths.append(len(self.seen[number]))
        width = max(map(len, self.blocks)) + 1
        # What vLLM leaves beyond a sequence's blocks is stale.
        tables = torch.tensor([blocks + [BLOCKS + 7] * (width - len(blocks)) for blocks in self.blocks])
        slots_T = torch.tensor(slots + [-1] * padding)
        batch = Batch.of(starts, lengths, tables.int(), slots_T)
        store(self.cache, self.codecs, keys, values, batch)
        output = torch.full_like(query, 7.0)
        attend(self.cache, self.codecs, query, batch, SCALE, output)
        wanted = torch.full_like(query, 7.0)
        for number, count in enumerate(new):
            for offset in range(count):
                row = starts[number] + offset
                wanted[row] = self.alone(query[row], number, lengths[number] - count + offset + 1)
        return output, wanted

    def alone(self, query_QD: torch.Tensor, number: int, tokens: int) -> torch.Tensor:
        """One query's attention to the first tokens of its sequence, as stored."""
        read = []
        for side, codec in enumerate((self.codecs.keys, self.codecs.values)):
            raw = torch.stack([seen[side] for seen in self.seen[number][:tokens]], dim=1)[None]
            read.append(codec.decode(codec.encode(raw), HEAD_DIM, torch.float32)[0])
        out = torch.empty(HEADS, HEAD_DIM)
        for head in range(HEADS):
            keys, values = (side[head // (HEADS // KV_HEADS)] for side in read)
            out[head] = (keys @ query_QD[head] * SCALE).softmax(0) @ values
        return out


@pytest.mark.parametrize("small", [False, True], ids=["at once", "in pieces"])
def test_mixed_batches(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks that go on, decoding, sequences that wait, padding: all in one cache."""
    if small:
        monkeypatch.setattr(paged, "_DECODED_ELEMENTS", 1)
        monkeypatch.setattr(paged, "_SCORES", 1)
    engine = Engine(mixed(), sequences=4, seed=0)
    for new, padding in (([5, 1, 0, 12], 0), ([1, 1, 7, 9], 3), ([1, 1, 1, 1], 2), ([3, 0, 1, 1], 0)):
        output, wanted = engine.step(new, padding)
        # fp32: matrix products of other shapes.
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.make is not None])
def test_every_format(name: str) -> None:
    """Slots of every format are written and read where they belong, beside bytes that nobody wrote."""
    engine = Engine(PagedCodecs.of(layer_plan(name, KV_HEADS, HEAD_DIM)), sequences=2, seed=1)
    for new in ([6, 3], [1, 1]):
        output, wanted = engine.step(new)
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


def test_groups_share_a_length() -> None:
    """Sequences that are decoded together have as many new tokens, the waiting ones none."""
    batch = Batch([0, 1, 4, 4, 5], [9, 3, 8, 2], torch.zeros(4, 1), torch.zeros(0), torch.zeros(0))
    assert list(batch.groups(1)) == [(1, [3, 0]), (3, [1])]


def test_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded at once, padding included, stays below the bound; one sequence is always taken."""
    monkeypatch.setattr(paged, "_DECODED_ELEMENTS", 40)
    lengths = [30, 1, 2, 100, 3]
    batch = Batch([0, 1, 2, 3, 4, 5], lengths, torch.zeros(5, 1), torch.zeros(0), torch.zeros(0))
    groups = [numbers for _, numbers in batch.groups(2)]
    assert groups == [[1, 2, 4], [0], [3]]
    assert all(len(group) == 1 or len(group) * max(lengths[n] for n in group) * 2 <= 40 for group in groups)


def test_slot_is_key_then_value() -> None:
    """Bytes of a slot: the key's codec, then the value's."""
    codecs = mixed()
    assert codecs.slot_bytes == codecs.keys.slot_bytes(HEAD_DIM) + codecs.values.slot_bytes(HEAD_DIM)
    cache = torch.zeros(2, KV_HEADS, BLOCK, codecs.slot_bytes, dtype=torch.uint8)
    keys, values = torch.randn(2, 1, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    store(cache, codecs, keys, values, Batch.of([0, 1], [1], torch.tensor([[1]]), torch.tensor([BLOCK + 2])))
    written = cache[1, :, 2]
    assert torch.equal(
        written[:, : codecs.key_bytes], codecs.keys.encode(keys.transpose(0, 1)[None])[0, :, 0]
    )
    assert torch.equal(
        written[:, codecs.key_bytes :], codecs.values.encode(values.transpose(0, 1)[None])[0, :, 0]
    )
    cache[1, :, 2] = 0
    assert not cache.any()


def test_scale_is_used() -> None:
    """Two tokens, worked by hand with the 16-bit codec."""
    codecs = PagedCodecs.of(layer_plan("bf16", 1, 2))
    cache = torch.zeros(1, 1, 2, codecs.slot_bytes, dtype=torch.uint8)
    keys = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    values = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    batch = Batch.of([0, 2], [2], torch.zeros(1, 1), torch.tensor([0, 1]))
    store(cache, codecs, keys, values, batch)
    output = torch.empty(2, 1, 2)
    attend(cache, codecs, torch.tensor([[[4.0, 0.0]], [[4.0, 0.0]]]), batch, 0.5, output)
    first = math.exp(2.0) / (math.exp(2.0) + 1)
    torch.testing.assert_close(output[:, 0], torch.tensor([[1.0, 0.0], [first, 2 * (1 - first)]]))


def test_a_step_that_stores_nothing() -> None:
    """Every token of the batch is padding: no slot changes, also where codecs ask for places."""
    cache = torch.zeros(2, KV_HEADS, BLOCK, turned().slot_bytes, dtype=torch.uint8)
    batch = Batch.of([0, 0], [2], torch.zeros(1, 1, dtype=torch.int64), torch.tensor([-1, -1]))
    keys = torch.ones(2, KV_HEADS, HEAD_DIM)
    store(cache, turned(), keys, keys, batch)
    assert not cache.any()


def test_codecs_that_ask_for_places() -> None:
    """Tokens of several sequences are stored in one step, each turned back by its own number."""
    engine = Engine(turned(), 3, seed=5)
    for new in ([3, 0, 5], [1, 4, 0], [1, 1, 1]):
        given, wanted = engine.step(new, padding=2)
        torch.testing.assert_close(given[: sum(new)], wanted[: sum(new)], atol=1e-5, rtol=1e-5)
