"""The compiled twins of ``compressor.numerics``, chosen where they run: numba on the CPU, else torch itself.

Both give the same results, bit for bit. Nothing is written to disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import torch

from compressor.numerics import nvfp4_search, scale_search
from compressor.numerics.fp8 import e4m3_ladder
from compressor.numerics.scale_search import Grid

# Below this many values a second thread costs more than it saves.
MIN_VALUES_PER_THREAD = 1 << 16


def search_nvfp4(u_N16: torch.Tensor, h_C16: torch.Tensor) -> torch.Tensor:
    """uint8 [N]: the best E4M3 code of each block of magnitudes; see ``numerics.nvfp4_search``.

    Args:
        u_N16: fp32, contiguous: weights times the tensor-level scale (signs do not matter).
        h_C16: fp32 importance of the C blocks of one row; block n has ``h_C16[n % C]``.
    """
    u_N16 = u_N16.abs()
    if not _compiled(u_N16):
        return nvfp4_search.search_codes(u_N16, h_C16.repeat(len(u_N16) // len(h_C16), 1))
    from compressor.kernels.nvfp4_search_cpu import search

    codes_N = torch.empty(len(u_N16), dtype=torch.uint8)
    u, h, codes, ladder = u_N16.numpy(), h_C16.numpy(), codes_N.numpy(), e4m3_ladder().numpy()
    _in_threads(lambda part: search(u[part], h, ladder, codes[part]), len(u), len(h), u_N16.numel())
    return codes_N


def best_candidate(
    w_NG: torch.Tensor, h_CG: torch.Tensor, scale_NK: torch.Tensor, zero_NK: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """int64 [N]: the best candidate of each group; arguments as ``numerics.scale_search.best_candidate``."""
    if not _compiled(w_NG):
        return scale_search.best_candidate(w_NG, h_CG, scale_NK, zero_NK, grid)
    from compressor.kernels.scale_search_cpu import kernel, search_arguments

    search, (low, high) = kernel(grid.kind), search_arguments(grid)
    best_N = torch.empty(len(w_NG), dtype=torch.int64)
    w, h, best = w_NG.contiguous().numpy(), h_CG.contiguous().numpy(), best_N.numpy()
    scale, zero = scale_NK.contiguous().numpy(), zero_NK.contiguous().numpy()
    _in_threads(
        lambda part: search(w[part], h, scale[part], zero[part], low, high, best[part]),
        len(w),
        len(h),
        w_NG.numel(),
    )
    return best_N


def _compiled(values: torch.Tensor) -> bool:
    return values.device.type == "cpu" and _has_numba()


@cache
def _has_numba() -> bool:
    if find_spec("numba") is None:
        warnings.warn("numba is not installed: scale searches on the CPU take much longer", stacklevel=2)
        return False
    return True


def _in_threads(work: Callable[[slice], None], length: int, multiple: int, values: int) -> None:
    """Runs ``work`` on equal ranges of ``length``, each starting at a multiple, in as many threads as torch."""
    threads = max(min(torch.get_num_threads(), values // MIN_VALUES_PER_THREAD), 1)
    step = -(-length // (threads * multiple)) * multiple
    parts = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    if len(parts) == 1:
        work(parts[0])
        return
    with ThreadPoolExecutor(len(parts), thread_name_prefix="search") as pool:
        for done in [pool.submit(work, part) for part in parts]:
            done.result()
