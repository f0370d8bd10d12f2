"""The windowed search over E4M3 codes against the search over every code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.kernels import search_nvfp4
from compressor.numerics.fp4 import round_e2m1
from compressor.numerics.fp8 import e4m3_ladder
from compressor.numerics.nvfp4_search import block_error, search_codes
from tests.numerics.blocks import hard_blocks, importances, search_every_code


@pytest.mark.parametrize("name", hard_blocks())
@pytest.mark.parametrize("weighted", [False, True])
def test_window_finds_what_every_code_finds(name: str, weighted: bool) -> None:
    """Same code, hence the same error, for every block."""
    blocks = hard_blocks()[name]
    importance = importances() if weighted else torch.ones(1, 16)
    assert torch.equal(search_codes(blocks, importance), search_every_code(blocks, importance))


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-2688, 2688, width=32, allow_subnormal=True), min_size=16, max_size=16),
    scale=st.sampled_from([1.0, 1e-2, 1e-4]),
)
def test_window_on_any_block(values: list[float], scale: float) -> None:
    """Hypothesis' own ideas of hard blocks."""
    block = torch.tensor([values]) * scale
    ones = torch.ones(1, 16)
    assert torch.equal(search_codes(block, ones), search_every_code(block, ones))


def test_window_is_not_too_narrow_for_a_block_alone() -> None:
    """Blocks whose best code is the last that the proof leaves over, each searched by itself."""
    blocks = hard_blocks()["normal"]
    ones = torch.ones(1, 16)
    codes = search_every_code(blocks, ones)
    ladder = e4m3_ladder()
    last = torch.searchsorted(ladder * 3.5, blocks.abs().amax(1)) - 1
    at_the_end = (codes == last).nonzero()[:, 0].tolist()
    assert len(at_the_end) > 10
    for n in at_the_end[:12]:
        assert search_codes(blocks[n : n + 1], ones) == codes[n]
        assert search_nvfp4(blocks[n : n + 1], ones) == codes[n]


def test_error_is_that_of_the_decoded_values() -> None:
    """The error that is minimised is the squared distance to what the code decodes to, in fp64 to 1e-5."""
    blocks = hard_blocks()["bf16"]
    scale = e4m3_ladder()[search_codes(blocks, torch.ones(1, 16)).long()]
    decoded = round_e2m1(blocks / scale[:, None]).double() * scale.double()[:, None]
    exact = ((decoded - blocks.double()) ** 2).sum(1)
    found = block_error(blocks.abs(), torch.ones_like(blocks), scale)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-12)


def test_grid_of_half_the_scale_is_finer() -> None:
    """The proof's finite part: at midpoints of the finer grid, ties go to the same point on both grids."""
    midpoints = torch.tensor([0.125, 0.375, 0.625, 0.875, 1.25, 1.75, 2.5])
    assert torch.equal(round_e2m1(2 * midpoints) / 2, round_e2m1(midpoints))


def test_search_beats_min_max() -> None:
    """On normal blocks the error is a quarter less than with the scale of the range."""
    blocks = hard_blocks()["normal"]
    ones = torch.ones(1, 16)
    ladder = e4m3_ladder()
    of_range = (blocks.abs().amax(1) / 6).to(torch.float8_e4m3fn).float()
    best = block_error(blocks.abs(), torch.ones_like(blocks), ladder[search_codes(blocks, ones).long()])
    usual = block_error(blocks.abs(), torch.ones_like(blocks), of_range)
    assert best.sum() < 0.78 * usual.sum()
