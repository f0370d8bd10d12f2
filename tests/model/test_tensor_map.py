"""Parameters filled from source tensors: the same values as transformers' own loader gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from compressor.checkpoint.base import Source
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.safetensors_file import safetensors_dtype
from compressor.errors import CheckpointError
from compressor.model.load import load_source_model
from compressor.model.skeleton import build_skeleton, compute_buffers
from compressor.model.tensor_map import Piece, TensorMap
from compressor.spec import TensorHeader

from .published import PUBLISHED
from .zoo import FAMILIES

Open = Callable[[str], FolderSource]


@pytest.mark.parametrize("name", [*FAMILIES, *(f"published {name}" for name in PUBLISHED)])
def test_every_parameter_and_buffer_is_the_loader_s(name: str, family: Open) -> None:
    """Values and dtypes of parameters, and of buffers whether stored or computed."""
    source = family(name)
    model = build_skeleton(source)
    tensors = TensorMap.of(model, source.headers, "here")
    compute_buffers(model, tensors.filled)
    ordinary = load_source_model(source, torch.float32)
    for path, parameter in ordinary.named_parameters():
        made = torch.full(parameter.shape, float("nan"))
        tensors.fill(source, {path: made})
        assert torch.equal(made, parameter), path
        if path in tensors.pieces:
            assert set(tensors.sources([path])) == {piece.tensor for piece in tensors.pieces[path]}
    buffers = dict(model.named_buffers())
    for path, buffer in ordinary.named_buffers():
        found = buffers[path]
        assert found.dtype == buffer.dtype
        if found.is_meta:
            found = torch.empty(found.shape, dtype=found.dtype)
            tensors.fill(source, {path: found})
        assert torch.equal(found, buffer), path


def test_experts_are_views_of_one_parameter(family: Open) -> None:
    """Each stored expert has its place, the second half of the rows for the second matrix."""
    source = family("mixtral")
    tensors = TensorMap.of(build_skeleton(source), source.headers, "here")
    pieces = {
        piece.tensor.partition("experts.")[2]: piece
        for piece in tensors.pieces["model.layers.0.mlp.experts.gate_up_proj"]
    }
    assert pieces["2.w3.weight"] == Piece(pieces["2.w3.weight"].tensor, expert=2, dim=0, start=48, size=48)
    assert len(pieces) == 8


class _Tensors:
    """A source of nothing but tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.headers = {
            name: TensorHeader(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        return self.tensors[name].clone()


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["split", "turned"])
def test_other_conversions_run_as_the_library_runs_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stored tensor that becomes two parameters, and one that is stored transposed."""
    model = _llama()
    numbers = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=numbers) for shape in ((12, 8), (12, 8), (8, 12)))
    prefix = "model.layers.0.mlp."
    if kind == "split":
        converter = WeightConverter(
            ["gate_up.weight"], ["gate_proj.weight", "up_proj.weight"], operations=[Chunk(dim=0)]
        )
        stored = {f"{prefix}gate_up.weight": torch.cat([gate, up])}
        expected = {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
    else:
        converter = WeightConverter(["down_t.weight"], ["down_proj.weight"], operations=[Transpose(0, 1)])
        stored = {f"{prefix}down_t.weight": down.T.contiguous()}
        expected = {f"{prefix}down_proj.weight": down}
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [converter])
    source = _Tensors(stored)
    tensors = TensorMap.of(model, source.headers, "here")
    assert tensors.filled == expected.keys()
    assert not tensors.pieces
    made = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    for _ in range(2):  # a converter keeps nothing from one run to the next
        tensors.fill(_as_source(source), made)
        assert all(torch.equal(made[name], expected[name]) for name in expected)
    for name in expected:
        assert tensors.sources([name]) == tuple(stored)


def _as_source(source: _Tensors) -> Source:
    return source  # type: ignore[return-value]


@pytest.mark.parametrize("count", [3, 5])
def test_experts_of_another_number_are_told(count: int, family: Open) -> None:
    """A checkpoint with more or fewer experts than its config says."""
    source = family("mixtral")
    headers = dict(source.headers)
    for matrix in ("w1", "w2", "w3"):
        stem = "model.layers.0.block_sparse_moe.experts"
        name = f"{stem}.3.{matrix}.weight"
        extra = f"{stem}.4.{matrix}.weight"
        headers[extra] = TensorHeader(extra, headers[name].dtype, headers[name].shape)
        if count == 3:
            del headers[extra], headers[name]
    with pytest.raises(CheckpointError, match=rf"the shape \[{count}, .*\], its config \[4, "):
        TensorMap.of(build_skeleton(source), headers, "here")


def test_tied_parameters_are_filled_from_either(family: Open) -> None:
    """The head of a tied model has no tensor of its own."""
    source = family("llama_tied")
    assert "lm_head.weight" not in source.headers
    tensors = TensorMap.of(build_skeleton(source), source.headers, "here")
    assert tensors.pieces["lm_head.weight"] == tensors.pieces["model.embed_tokens.weight"]


def test_values_are_cast_to_the_target(family: Open) -> None:
    """As ``Tensor.to`` rounds them."""
    source = family("llama")
    tensors = TensorMap.of(build_skeleton(source), source.headers, "here")
    target = nn.Parameter(torch.empty(256, 32, dtype=torch.bfloat16))
    tensors.fill(source, {"lm_head.weight": target})
    assert torch.equal(target, source.read("lm_head.weight").to(torch.bfloat16))
