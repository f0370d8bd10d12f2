"""Blocks and pages, against what vLLM 0.32's own functions gave for the same layers.

The expected bytes are ``blocks of one sequence x bytes of a block`` as ``get_kv_cache_groups`` and
``get_kv_cache_config_from_groups`` (v1/core/kv_cache_utils.py) answered for specifications made as
``Attention.get_kv_cache_spec`` makes them, with the block size of ``Platform._align_hybrid_block_size`` and
``_align_heterogeneous_kv_block_size`` and no tokens in flight.
"""

from __future__ import annotations

import pytest

from compressor.kv.formats import FORMATS
from compressor.planner.kv_pages import PagedLayer, paged_bytes

KINDS = {"f": "full", "s": "sliding", "c": "chunked"}
WINDOWS = {"s": 1024, "c": 8192}


def layers(pattern: str, skip: tuple[int, ...], heads: int, head_dim: int, form: str) -> list[PagedLayer]:
    """One layer for each letter; full ones that are not skipped have the format."""
    slot = FORMATS[form].slot_bytes(head_dim)
    found = []
    for index, letter in enumerate(pattern):
        if letter == "m":
            found.append(PagedLayer("state", 32 * 128 * 128 * 4, 0, False))
            continue
        quantized = letter == "f" and index not in skip
        token = heads * slot if quantized else heads * 4 * head_dim
        found.append(PagedLayer(KINDS[letter], token, heads * 2 * head_dim, quantized, WINDOWS.get(letter)))
    return found


LLAMA = ("f" * 80, (0, 1, 78, 79), 8, 128)
GEMMA = (("sssssf" * 11)[:62], (0, 1, 60, 61), 16, 128)
SCOUT = ("cccf" * 12, (0, 1, 46, 47), 8, 128)
NEXT = ("mmmf" * 12, (), 2, 256)
NEXT_SKIPPED = ("mmmf" * 12, (3,), 2, 256)


@pytest.mark.parametrize(
    ("model", "form", "short", "long"),
    [
        (LLAMA, "turboquant_4bit_nc", 100_204_544, 12_826_181_632),
        (LLAMA, "turboquant_k3v4_nc", 90_243_072, 11_551_113_216),
        (LLAMA, "turboquant_3bit_nc", 80_281_600, 10_276_044_800),
        (("f" * 8, (), 8, 64), "turboquant_3bit_nc", 3_483_648, 452_984_832),
        (GEMMA, "turboquant_k8v4", 545_259_520, 5_879_889_920),
        (GEMMA, "turboquant_3bit_nc", 545_259_520, 5_879_889_920),
        (SCOUT, "turboquant_4bit_nc", 201_326_592, 7_650_410_496),
        (NEXT, "turboquant_k8v4", 100_718_592, 1_309_341_696),
        (NEXT, "turboquant_3bit_nc", 100_666_368, 704_664_576),
        (NEXT_SKIPPED, "turboquant_k8v4", 305_135_616, 3_509_059_584),
        (NEXT_SKIPPED, "turboquant_4bit_nc", 412_090_368, 3_605_790_720),
    ],
)
def test_bytes_are_those_that_vllm_allots(model, form, short, long):
    """One sequence of 1,000 tokens, and one of 131,072."""
    assert paged_bytes(layers(*model, form), 1000) == short
    assert paged_bytes(layers(*model, form), 131_072) == long


def test_windows_beside_16_bit_full_layers_cannot_be_paged():
    """gpt-oss: the windows' page is padded for the blocks of quantized layers, skipped layers' is larger."""
    assert paged_bytes(layers("sf" * 18, (0, 1, 34, 35), 8, 64, "turboquant_4bit_nc"), 1000) is None


def test_whole_blocks_and_nothing_else_in_16_bit():
    """Dense layers: the last block of 16 tokens is the only padding."""
    plain = layers("f" * 4, (0, 1, 2, 3), 8, 128, "bf16")
    assert paged_bytes(plain, 17) == 32 * 4 * 8 * 512
    assert paged_bytes(plain, 32) == 32 * 4 * 8 * 512
