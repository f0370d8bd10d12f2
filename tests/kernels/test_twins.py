"""The compiled functions against torch: equal bit for bit, in any number of threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

import compressor.kernels as kernels
from compressor.kernels.input_rounding import twin_for
from compressor.kernels.input_rounding_cpu import round_groups
from compressor.numerics import groups, nvfp4_search, scale_search
from compressor.numerics.grids import E2M1, E4M3, INT4, INT8, Grid
from compressor.schemes import inputs, parse_scheme
from tests.numerics.blocks import hard_blocks, importances
from tests.schemes.cases import hard_inputs, some_range, wild_inputs

GRIDS = pytest.mark.parametrize("grid", [E2M1, E4M3, INT4, INT8], ids=["e2m1", "e4m3", "int4", "int8"])


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Runs a test alone and split among threads, however small the work."""
    monkeypatch.setattr(kernels, "MIN_VALUES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _weights(groups: int, size: int) -> torch.Tensor:
    """Normal values with a few extremes, zeros of both signs, ties and subnormal quotients."""
    w = torch.randn(groups, size, generator=torch.Generator().manual_seed(groups))
    w[0] = 0.0
    w[1] = -0.0
    w[2, :4] = torch.tensor([1e-30, -1e-30, 50.0, -50.0])
    w[3] = torch.arange(size) / 4 - 2
    return w


@pytest.mark.parametrize("name", hard_blocks())
@pytest.mark.parametrize("weighted", [False, True])
def test_nvfp4_search(name: str, weighted: bool, threads: int) -> None:
    """Same codes as the torch search."""
    blocks = hard_blocks()[name]
    importance = importances() if weighted else torch.ones(1, 16)
    assert torch.equal(
        kernels.search_nvfp4(blocks, importance), nvfp4_search.search_codes(blocks, importance)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nvfp4", "fp8_dynamic", "fp8_block", "fp8_static", "int8"])
def test_input_rounding(kind: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of zeros and what is not finite included, in any layout of memory and any number of chunks."""
    scheme = parse_scheme({"kind": "int8", "activations": "dynamic"} if kind == "int8" else kind)
    tensors = scheme.input_tensors(some_range(hard_inputs()))
    x_NI = wild_inputs().to(dtype)
    before = x_NI.clone()
    twins = (twin_for(x_NI), None)
    assert twins[0] is round_groups
    for chunk, some_NI in (
        (groups.CHUNK_VALUES, x_NI),
        (256 * 9, x_NI),
        (256 * 9, x_NI[:, :128]),
        (256 * 9, x_NI.T.contiguous().T),
        (256 * 9, x_NI[:1]),
        (256 * 9, x_NI[:0]),
    ):
        monkeypatch.setattr(groups, "CHUNK_VALUES", chunk)
        found = []
        for twin in twins:
            monkeypatch.setattr(inputs, "twin_for", lambda _, twin=twin: twin)
            found.append(scheme.round_inputs(some_NI, tensors).float())
        ours, expected = found
        same = ours.view(torch.int32) == expected.view(torch.int32)
        assert (same | (ours.isnan() & expected.isnan())).all()
    assert torch.equal(x_NI.nan_to_num(), before.nan_to_num())


def test_nvfp4_importance_repeats_by_row(threads: int) -> None:
    """Block n has the importance of column block n mod C, also where threads divide the rows."""
    blocks = hard_blocks()["normal"]
    importance = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) + 1e-3
    assert torch.equal(
        kernels.search_nvfp4(blocks, importance), nvfp4_search.search_codes(blocks, importance)
    )


@GRIDS
@pytest.mark.parametrize("size", [16, 32, 96, 577])
def test_best_candidate(grid: Grid, size: int, threads: int) -> None:
    """Same candidates as the torch search, for groups of any length."""
    w = _weights(30, size)
    generator = torch.Generator().manual_seed(1)
    scale = (torch.rand(30, 12, generator=generator) + 0.3) * 3 / grid.high
    zero = torch.randint(-4, 5, (30, 12), generator=generator).float() * (grid.kind == "int")
    importance = torch.rand(3, size, generator=generator) + 0.1
    expected = scale_search.best_candidate(w, importance, scale, zero, grid)
    assert torch.equal(kernels.best_candidate(w, importance, scale, zero, grid), expected)


@GRIDS
@pytest.mark.parametrize("neutral", [0.0, -0.0])
def test_encode_and_decode(grid: Grid, neutral: float, threads: int) -> None:
    """Same codes (signs of zeros included) and the same decoded weights."""
    w = _weights(30, 48)
    scale = torch.linspace(0.01, 2.0, 30)
    zero = torch.full((30,), neutral)
    codes = kernels.encode(w, scale, zero, grid)
    expected = grid.encode(w, scale, zero)
    assert codes.dtype == expected.dtype
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(kernels.decode(codes, scale, zero, grid), grid.decode(expected, scale, zero))


def test_every_e4m3_code_comes_back() -> None:
    """Encoding the value of each finite code gives the code, subnormals and both zeros included."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    one = torch.ones(1)
    back = kernels.encode(finite.float()[None], one, -torch.zeros(1), E4M3)
    assert torch.equal(back.view(torch.uint8)[0], finite.view(torch.uint8))


def test_integers_use_zero_points(threads: int) -> None:
    """Zero points shift codes by whole steps, with saturation."""
    w = _weights(30, 32)
    scale, zero = torch.full((30,), 0.2), torch.arange(30).float() % 16 - 8
    codes = kernels.encode(w, scale, zero, INT4)
    assert torch.equal(codes, INT4.encode(w, scale, zero))
    assert codes.min() == -8
    assert codes.max() == 7
    assert torch.equal(kernels.decode(codes, scale, zero, INT4), INT4.decode(codes, scale, zero))


def test_without_numba_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing numba is said once, and the results are the same."""
    blocks = hard_blocks()["normal"][:8]
    ones = torch.ones(1, 16)
    expected = kernels.search_nvfp4(blocks, ones)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._has_numba.cache_clear()
    try:
        with pytest.warns(UserWarning, match="numba is not installed"):
            assert torch.equal(kernels.search_nvfp4(blocks, ones), expected)
        assert torch.equal(
            kernels.encode(blocks, ones[0, :8], ones[0, :8], E2M1),
            E2M1.encode(blocks, ones[0, :8], ones[0, :8]),
        )
    finally:
        kernels._has_numba.cache_clear()


def test_without_triton_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel can be built, that is said, and CUDA tensors are left to torch."""
    monkeypatch.setitem(sys.modules, "compressor.kernels.grid_codes_cuda", None)
    kernels._has_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton does not work here"):
            assert not kernels._has_triton(torch.device("cpu"))
    finally:
        kernels._has_triton.cache_clear()
    assert not kernels.on_cuda(torch.ones(1))


def test_kernels_wait_for_what_compiles_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of others wait, those of the thread itself do not, and its errors are nobody's."""
    monkeypatch.setattr(kernels, "_ahead", [])
    monkeypatch.setattr(kernels, "_has_triton", lambda device: True)
    tensor, go_on = SimpleNamespace(device=torch.device("cuda")), Event()
    seen: list[str] = []

    def use() -> None:
        assert kernels.on_cuda(tensor)  # type: ignore[arg-type]
        seen.append("ahead")
        go_on.wait(10)
        raise RuntimeError("out of memory")

    def call() -> None:
        kernels.on_cuda(tensor)  # type: ignore[arg-type]
        seen.append("call")

    kernels.compile_ahead(use)
    other = Thread(target=call)
    other.start()
    other.join(0.2)
    assert other.is_alive()
    go_on.set()
    other.join(10)
    assert seen == ["ahead", "call"]
