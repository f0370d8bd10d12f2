"""What a packed layer gives to attention, holds, and weighs."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import UserError
from compressor.kv.layer import CONTINUATION_TOKENS, LayerCodecs, Mode, PackedLayer
from tests.kv.codecs import Coarse, Plain

BATCH, HEADS, DIM = 2, 3, 8


def _states(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, HEADS, tokens, DIM, generator=generator)
    return keys, values


def _rounded(x: torch.Tensor, step: float = 0.25) -> torch.Tensor:
    """What ``Coarse`` makes of values in its range, told apart from it."""
    return torch.round(x / step) * step


def _expected(x: torch.Tensor, chunk: int, mode: Mode, sink: int, recent: int) -> torch.Tensor:
    """What the last ``chunk`` of the tokens ``x`` attends to, position by position."""
    total = x.shape[2]
    before = total - chunk
    raw_chunk = mode == "vllm" and chunk > (CONTINUATION_TOKENS if before else 1)
    parts = []
    for position in range(total):
        token = x[:, :, position]
        end = before if raw_chunk else total
        if raw_chunk and position >= before:
            parts.append(token)
        elif position < sink or position >= end - recent:
            parts.append(token.bfloat16().float())
        else:
            parts.append(_rounded(token.bfloat16().float() if recent else token))
    return torch.stack(parts, dim=2)


@pytest.mark.parametrize("mode", ["strict", "vllm"])
@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (3, 0), (0, 5), (4, 6), (40, 2)])
@pytest.mark.parametrize("chunks", [[20, 1, 1, 7, 1], [1, 1, 30, 2], [5, 130, 1, 129], [3, 128, 4]])
def test_every_position_is_read_as_its_place_says(
    mode: Mode, sink: int, recent: int, chunks: list[int]
) -> None:
    """Sink, packed middle, recent window and raw chunk, against a computation by position."""
    layer = PackedLayer(LayerCodecs(Coarse(), Coarse(), sink, recent), mode)
    keys, values = _states(sum(chunks))
    done = 0
    for chunk in chunks:
        assert layer.get_mask_sizes(chunk) == (done + chunk, 0)
        part = slice(done, done + chunk)
        done += chunk
        read = layer.update(keys[:, :, part], values[:, :, part])
        for found, x in zip(read, (keys, values), strict=True):
            assert torch.equal(found, _expected(x[:, :, :done], chunk, mode, sink, recent))
        assert layer.get_seq_length() == done


def test_bytes_are_exact_and_buffers_grow_by_a_share() -> None:
    """Slots in use and 16-bit tokens; appending one by one allocates seldom, and a half too much at most."""
    layer = PackedLayer(LayerCodecs(Coarse(), Plain(), sink_tokens=4, recent_tokens=8), "strict")
    assert layer.nbytes() == layer.allocated_nbytes() == 0
    keys, values = _states(1000)
    sizes = set()
    for token in range(1000):
        layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        held = BATCH * HEADS * (min(token + 1, 12) * 2 * 2 * DIM + max(0, token + 1 - 12) * (1 + 4) * DIM)
        assert layer.nbytes() == held
        assert layer.allocated_nbytes() >= held
        sizes.add(layer.allocated_nbytes())
        if token > 100:
            assert layer.allocated_nbytes() <= 1.5 * held + BATCH * HEADS * 5 * DIM
    # 12 sizes while sink and window fill, then 16 x 1.5^n up to 1000.
    assert len(sizes) < 30
    assert layer.largest_read_nbytes == 2 * BATCH * HEADS * 1000 * DIM * 4
    layer.reset()
    assert (layer.nbytes(), layer.get_seq_length(), layer.is_initialized) == (0, 0, False)


@pytest.mark.parametrize("sink", [0, 6])
@pytest.mark.parametrize("removed", [1, 5, 12])
def test_cropping_forgets_the_last_tokens(sink: int, removed: int) -> None:
    """A cropped layer goes on like one that never saw them, into the sink too; both signs of transformers."""
    keys, values = _states(20)
    for argument in (-removed, 14 - removed):
        layer, never = (PackedLayer(LayerCodecs(Coarse(), Coarse(), sink), "strict") for _ in range(2))
        assert layer.is_croppable
        layer.update(keys[:, :, :14], values[:, :, :14])
        layer.crop(argument)
        never.update(keys[:, :, : 14 - removed], values[:, :, : 14 - removed])
        assert layer.nbytes() == never.nbytes()
        assert layer.get_seq_length() == 14 - removed
        read, expected = (each.update(keys[:, :, 14:], values[:, :, 14:]) for each in (layer, never))
        assert torch.equal(read[0], expected[0])
        assert torch.equal(read[1], expected[1])
    layer.crop(0)
    layer.crop(1000)
    assert layer.get_seq_length() == 20 - removed


def test_a_recent_window_is_not_rolled_back() -> None:
    """Its tokens were packed meanwhile."""
    layer = PackedLayer(LayerCodecs(Coarse(), Coarse(), recent_tokens=2), "strict")
    layer.update(*_states(5))
    assert not layer.is_croppable
    with pytest.raises(UserError, match="cannot be rolled back"):
        layer.crop(-1)


def test_batches_are_reordered_repeated_and_selected() -> None:
    """As the same changes of the keys themselves, in the sink, the slots and the window."""
    keys, values = _states(9)
    more = _states(1, seed=1)

    def read(name: str, argument: object) -> torch.Tensor:
        layer = PackedLayer(LayerCodecs(Coarse(), Coarse(), 2, 3), "strict")
        getattr(layer, name)(argument)  # empty: nothing to change
        layer.update(keys, values)
        before = layer.nbytes()
        getattr(layer, name)(argument)
        batch = layer.nbytes() * BATCH // before
        found: torch.Tensor = layer.update(*(side[:1].expand(batch, -1, -1, -1) for side in more))[0]
        return found[:, :, :4]

    expected = _expected(keys, 9, "strict", 2, 3)[:, :, :4]
    order = torch.tensor([1, 0])
    assert torch.equal(read("reorder_cache", order), expected[order])
    assert torch.equal(read("batch_repeat_interleave", 3), expected.repeat_interleave(3, dim=0))
    assert torch.equal(read("batch_select_indices", torch.tensor([1])), expected[1:])
