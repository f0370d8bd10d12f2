"""What a plan predicts, against sums by hand."""

from __future__ import annotations

from typing import Any

from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.planner.layout import group_units
from compressor.planner.predict import BASE_RSS_BYTES, CHUNK_BYTES, Prediction, predict
from compressor.recipe.model import WeightsSection
from compressor.spec import TensorHeader

from .fakes import LLAMA, LLAMA4, llama4_headers, llama_headers


def predicted(scheme: str, headers: dict[str, TensorHeader], config: dict[str, Any] = LLAMA) -> Prediction:
    """The prediction for a model whose projections all take one scheme."""
    section = WeightsSection.model_validate({"scheme": scheme})
    claims = claim_tensors(headers, config, family_for(config), section, DIALECTS["compressed-tensors"])
    return predict(claims, group_units(claims), config, 0)


def test_a_tied_pair_counts_once_though_both_are_stored() -> None:
    """As if the head were not there; what is written is written."""
    tied = LLAMA | {"tie_word_embeddings": True}
    once = predicted("nvfp4a16", llama_headers(tied=True), tied)
    both = predicted("nvfp4a16", llama_headers(), tied)
    free = predicted("nvfp4a16", llama_headers())
    assert (both.parameters, both.source_bytes) == (once.parameters, once.source_bytes)
    assert free.parameters == once.parameters + 512 * 128
    assert free.source_bytes == once.source_bytes + 512 * 128 * 2
    assert both.result_bytes == free.result_bytes


def test_a_head_without_an_embedding_counts() -> None:
    """A stored head is the pair's only tensor where the embedding is left out."""
    headers = llama_headers()
    del headers["model.embed_tokens.weight"]
    tied = predicted("nvfp4a16", headers, LLAMA | {"tie_word_embeddings": True})
    assert tied.parameters == predicted("nvfp4a16", headers).parameters


def peak(scheme: str, headers: dict[str, TensorHeader], config: dict[str, Any] = LLAMA) -> int:
    """Predicted memory beyond the base."""
    return predicted(scheme, headers, config).peak_rss_bytes - BASE_RSS_BYTES


def test_memory_of_matrices_that_share_a_scale() -> None:
    """NVFP4 holds gate and up together, FP8 one of them, while the next is read; one is decoded to fp32."""
    headers = llama_headers(hidden=128, wide=4096, kv=64, vocab=16)
    matrix = 4096 * 128
    solve = 4 * matrix + 3 * 4 * matrix
    assert peak("nvfp4a16", headers) == 3 * (matrix * 2) + solve
    assert peak("fp8_dynamic", headers) == 2 * (matrix * 2) + solve


def test_memory_of_large_matrices_has_bounded_temporaries() -> None:
    """Chunks of rows bound them, whatever the matrix."""
    headers = llama_headers(hidden=8192, wide=32768, kv=1024, vocab=16)
    matrix = 8192 * 32768
    assert peak("fp8_dynamic", headers) == 2 * (matrix * 2) + 4 * matrix + CHUNK_BYTES


def test_memory_of_a_large_copy() -> None:
    """An embedding that is only copied is read whole; beside it the first matrices."""
    headers = llama_headers(hidden=128, wide=256, vocab=100_000)
    assert peak("nvfp4a16", headers) == 2 * (100_000 * 128 + 128 * 128 + 2 * 64 * 128)


def test_experts_are_read_one_by_one() -> None:
    """Memory does not depend on their number: one expert's matrices, the next as read and taken apart."""
    few, many = (
        peak("nvfp4a16", llama4_headers(experts=experts, hidden=64, wide=4096), LLAMA4) for experts in (2, 64)
    )
    assert few == many == 3 * (64 * 2 * 4096 * 2) + 4 * 4 * 64 * 4096
