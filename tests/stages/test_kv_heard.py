"""The pass that hears keys, values and queries, against the caches of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from compressor.checkpoint.folder import FolderSource
from compressor.model.load import load_source_model
from compressor.progress import Silent
from compressor.stages.kv_heard import LayerHeard, hear_layers
from compressor.stages.walk import WalkSpec
from tests.model.zoo import FAMILIES

SPEC = WalkSpec(32, "float32", "host", 1 << 20, keep_inputs=False)
IDS = torch.arange(48).view(4, 12) * 11 % 250


class _Stopping(Silent):
    """Interrupts the pass when a block is done."""

    def __init__(self, block: str) -> None:
        self._block = block

    def advance(self, amount: int, note: str = "") -> None:
        if note == self._block:
            raise KeyboardInterrupt


def caches(source: FolderSource) -> DynamicCache:
    """Keys and values of all sequences, by the ordinary forward pass."""
    model = load_source_model(source, torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


@pytest.mark.parametrize(("name", "layers"), [("llama", [0, 1]), ("qwen3_next", [1]), ("gpt_oss", [1])])
def test_what_is_heard_is_what_the_cache_holds(name: str, layers: list[int], tmp_path: Path) -> None:
    """Largest magnitudes and sums of products, over batches of two sequences."""
    source = FolderSource(FAMILIES[name](tmp_path / "model"))
    heard = hear_layers(source, IDS, layers, SPEC, tmp_path, Silent())
    assert sorted(heard) == layers
    cache = caches(source)
    for index in layers:
        key, value = cache.layers[index].keys, cache.layers[index].values
        found = heard[index]
        # fp32 of the same passes, in other batches.
        near = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(found.key_HD, key.abs().amax(dim=(0, 2)), **near)
        torch.testing.assert_close(found.value_HD, value.abs().amax(dim=(0, 2)), **near)
        torch.testing.assert_close(found.key_HDD, torch.einsum("bhtd,bhte->hde", key, key), **near)
        hadamard = torch.ones(1, 1)
        while len(hadamard) < value.shape[-1]:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
        rotated = value @ hadamard / value.shape[-1] ** 0.5
        torch.testing.assert_close(found.rotated_HD, rotated.abs().amax(dim=(0, 2)), **near)


def test_a_stopped_pass_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """Bit for bit; the finished block is not heard again."""
    source = FolderSource(FAMILIES["llama"](tmp_path / "model"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = hear_layers(source, IDS, [0, 1], SPEC, whole, Silent())
    with pytest.raises(KeyboardInterrupt):
        hear_layers(source, IDS, [0, 1], SPEC, parts, _Stopping("block 0"))
    stamp = (parts / "heard-00000.safetensors").stat().st_mtime_ns
    assert not (parts / "heard-00001.safetensors").exists()
    found = hear_layers(source, IDS, [0, 1], SPEC, parts, Silent())
    assert (parts / "heard-00000.safetensors").stat().st_mtime_ns == stamp
    for index in (0, 1):
        for name, tensor in expected[index].tensors().items():
            assert torch.equal(tensor, found[index].tensors()[name])


def test_queries_count_for_the_head_that_they_read() -> None:
    """Two query heads for each of two KV heads, by a loop."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 5, 8)
    found = LayerHeard.nothing(2, 8)
    found.add(SimpleNamespace(query_BQTD=query, key_BHTD=key, value_BHTD=key))  # type: ignore[arg-type]
    for head in range(2):
        rows = query[:, 2 * head : 2 * head + 2].reshape(-1, 8).double()
        torch.testing.assert_close(found.query_HDD[head], rows.T @ rows, rtol=1e-5, atol=1e-5)
