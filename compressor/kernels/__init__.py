"""The compiled twins of ``compressor.numerics``, chosen where they run: numba on the CPU, Triton on CUDA.

Where there is no compiler torch itself takes over. All give the same results, bit for bit. Triton keeps what
it compiled in its own cache folder; numba writes nothing.

Legend: N groups of G values, C groups in one row of a matrix, K candidates of a group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from threading import Thread, current_thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.numerics import nvfp4_search, scale_search
from compressor.numerics.fp8 import e4m3_ladder
from compressor.numerics.grids import INT8, Grid

# Below this many values a second thread costs more than it saves.
MIN_VALUES_PER_THREAD = 1 << 16

_ahead: list[Thread] = []


def search_nvfp4(u_N16: torch.Tensor, h_C16: torch.Tensor) -> torch.Tensor:
    """uint8 [N]: the best E4M3 code of each block; see ``numerics.nvfp4_search``.

    Args:
        u_N16: fp32, weights times the tensor-level scale.
        h_C16: fp32 importance of the C blocks of one row; block n has ``h_C16[n % C]``.
    """
    if on_cuda(u_N16):
        from compressor.kernels.nvfp4_search_cuda import search_codes

        return search_codes(u_N16, h_C16)
    if not compiled(u_N16):
        return nvfp4_search.search_codes(u_N16, h_C16)
    from compressor.kernels.nvfp4_search_cpu import search

    codes_N = torch.empty(len(u_N16), dtype=torch.uint8)
    u, h, codes, ladder = as_array(u_N16), as_array(h_C16), as_array(codes_N), as_array(e4m3_ladder())
    in_threads(lambda part: search(u[part], h, ladder, codes[part]), len(u), u.size, multiple=len(h))
    return codes_N


def best_candidate(
    w_NG: torch.Tensor, h_CG: torch.Tensor, scale_NK: torch.Tensor, zero_NK: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """int64 [N]: the best candidate of each group; arguments as ``numerics.scale_search.best_candidate``."""
    if on_cuda(w_NG):
        from compressor.kernels import scale_search_cuda as cuda

        if w_NG.shape[1] <= cuda.LARGEST_GROUP:
            return cuda.best_candidate(w_NG, h_CG, scale_NK, zero_NK, grid)
    if not compiled(w_NG):
        return scale_search.best_candidate(w_NG, h_CG, scale_NK, zero_NK, grid)
    from compressor.kernels.scale_search_cpu import kernel

    search, low, high = kernel(grid.kind), np.float32(grid.low), np.float32(grid.high)
    best_N = torch.empty(len(w_NG), dtype=torch.int64)
    w, h, best = as_array(w_NG), as_array(h_CG), as_array(best_N)
    scale, zero = as_array(scale_NK), as_array(zero_NK)

    def work(part: slice) -> None:
        search(w[part], h, scale[part], zero[part], low, high, best[part])

    in_threads(work, len(w), w.size, multiple=len(h))
    return best_N


def encode(w_NG: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [N, G]; arguments as ``Grid.encode``."""
    if on_cuda(w_NG):
        from compressor.kernels import grid_codes_cuda

        return grid_codes_cuda.encode(w_NG, scale_N, zero_N, grid)
    if not compiled(w_NG):
        return grid.encode(w_NG, scale_N, zero_N)
    from compressor.kernels.grid_codes_cpu import encoder

    encode_groups, low, high = encoder(grid.kind), np.float32(grid.low), np.float32(grid.high)
    codes_NG = torch.empty(w_NG.shape, dtype=torch.int8 if grid.kind == "int" else torch.uint8)
    w, scale, zero, codes = as_array(w_NG), as_array(scale_N), as_array(zero_N), as_array(codes_NG)

    def work(part: slice) -> None:
        encode_groups(w[part], scale[part], zero[part], low, high, codes[part])

    in_threads(work, len(w), w.size)
    return codes_NG.view(grid.dtype)


def decode(codes_NG: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor, grid: Grid) -> torch.Tensor:
    """fp32 [N, G]; arguments as ``Grid.decode``."""
    if on_cuda(codes_NG):
        from compressor.kernels import grid_codes_cuda

        return grid_codes_cuda.decode(codes_NG, scale_N, zero_N, grid)
    if not compiled(codes_NG):
        return grid.decode(codes_NG, scale_N, zero_N)
    from compressor.kernels.grid_codes_cpu import decode_codes

    weight_NG = torch.empty(codes_NG.shape)
    codes, weight, table = (
        as_array(codes_NG.view(torch.uint8)),
        as_array(weight_NG),
        as_array(grid.byte_values()),
    )
    scale, zero = as_array(scale_N), as_array(zero_N)
    in_threads(
        lambda part: decode_codes(codes[part], table, scale[part], zero[part], weight[part]),
        len(codes),
        codes.size,
    )
    return weight_NG


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory, or a copy's if it is not contiguous."""
    return tensor.contiguous().numpy()


def compiled(values: torch.Tensor) -> bool:
    """Whether numba's functions can take this tensor."""
    return values.device.type == "cpu" and _has_numba()


def on_cuda(values: torch.Tensor) -> bool:
    """Whether Triton's kernels can take this tensor; waits for what ``compile_ahead`` has under way."""
    if values.device.type != "cuda":
        return False
    if current_thread() not in _ahead:
        for thread in _ahead:
            thread.join()
    return _has_triton(values.device)


def compile_ahead(use: Callable[[], object]) -> None:
    """Calls ``use``, which is to call kernels, in a thread: so they compile while others read and compute.

    A kernel called meanwhile waits, rather than compile a second time. What fails in ``use`` is left to the
    calls that matter. No daemon: an interpreter must not end within a compiler.
    """

    def work() -> None:
        with suppress(Exception), torch.no_grad():
            use()

    thread = Thread(target=work, name="compile-ahead")
    _ahead.append(thread)
    thread.start()


@cache
def _has_triton(device: torch.device) -> bool:
    """Tries a small kernel: Triton needs a C compiler on the machine and a device that it knows."""
    try:
        from compressor.kernels.grid_codes_cuda import decode

        # aligned as real calls are, so that it serves them
        code_NG, one_N = torch.ones(1, 16, dtype=torch.int8, device=device), torch.ones(1, device=device)
        decode(code_NG, one_N, one_N, INT8)
    except Exception as error:  # whatever it is, torch does the same work
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"Triton does not work here, solving takes much longer ({first})", stacklevel=2)
        return False
    return True


@cache
def _has_numba() -> bool:
    if find_spec("numba") is None:
        warnings.warn("numba is not installed: scale searches on the CPU take much longer", stacklevel=2)
        return False
    return True


def in_threads(work: Callable[[slice], None], length: int, values: int, *, multiple: int = 1) -> None:
    """Runs ``work`` on equal ranges of ``length``, each starting at a multiple, in torch's threads."""
    threads = max(min(torch.get_num_threads(), values // MIN_VALUES_PER_THREAD), 1)
    step = -(-length // (threads * multiple)) * multiple
    parts = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    if len(parts) == 1:
        work(parts[0])
        return
    with ThreadPoolExecutor(len(parts), thread_name_prefix="kernel") as pool:
        for done in [pool.submit(work, part) for part in parts]:
            done.result()
