"""Prediction layers compute what vLLM and transformers say they do, and are read and given back whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.folder import FolderSource
from compressor.drafts.native_layer import PredictionLayer
from compressor.drafts.native_table import native_family, prediction_names
from compressor.errors import CheckpointError

from .native_models import RUN, hidden_of, opened, qwen3_next_by_hand

# fp32 sums in another order, through one block.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def slots(layer: PredictionLayer, ids_BT: torch.Tensor, hidden_BTD: torch.Tensor) -> Any:
    """What the layer makes of all slots of a text but the last, whose next token is not known."""
    from transformers import DynamicCache

    count = ids_BT.shape[1] - 1
    with torch.no_grad():
        return layer(
            ids_BT[:, 1:],
            hidden_BTD[:, :-1],
            torch.arange(count).expand(len(ids_BT), -1),
            torch.ones(len(ids_BT), count, count, dtype=torch.bool).tril(),
            DynamicCache(),
        )


def test_qwen3_next_computes_as_by_hand(tmp_path: Path) -> None:
    """Against the same layer written out from the stored tensors, and it recycles what the head reads."""
    source, target, layer = opened("qwen3_next", tmp_path)
    ids_1T = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(1))
    hidden_1TD = hidden_of(target, ids_1T)
    recycled, normed = slots(layer, ids_1T, hidden_1TD)
    tensors = {name: source.read(name) for name in source.headers}
    by_hand_TD = qwen3_next_by_hand(tensors, source.config, ids_1T[0, 1:], hidden_1TD[0, :-1])
    torch.testing.assert_close(normed[0], by_hand_TD, **CLOSE)
    assert recycled is normed
    torch.testing.assert_close(layer.logits(normed), target.lm_head(normed))


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_layers_behind_the_last_compute_as_transformers(name: str, tmp_path: Path) -> None:
    """Against transformers' own prediction layer, given the zero that vLLM puts at position 0."""
    from transformers.modeling_layers import MtpModel

    _, target, layer = opened(name, tmp_path)
    ids_1T = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(1))
    hidden_1TD = hidden_of(target, ids_1T)
    recycled, normed = slots(layer, ids_1T, hidden_1TD)
    # The library knows these layers by the numbers that the published models give them.
    target._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]
    library = MtpModel.from_pretrained(target).float().eval()
    embedded_1TD = target.get_input_embeddings()(ids_1T[:, 1:])
    embedded_1TD[:, 0] = 0
    positions = torch.arange(8)[None]
    mask = torch.zeros(8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), float("-inf"))
    with torch.no_grad():
        expected = library.layers[0](
            embedded_1TD,
            hidden_1TD[:, :-1],
            position_embeddings=target.get_decoder().rotary_emb(embedded_1TD, positions),
            attention_mask=mask[None, None],
            position_ids=positions,
            past_key_values=None,
        )
    torch.testing.assert_close(normed, expected, **CLOSE)
    # GLM recycles the state in front of the norm.
    assert (recycled is normed) == (name == "deepseek_v3")


@pytest.mark.parametrize("name", RUN)
def test_every_tensor_is_read_and_given_back(name: str, tmp_path: Path) -> None:
    """All tensors of the layer but copies of the model's ends, bit for bit; none of the target's changes."""
    source, target, layer = opened(name, tmp_path)
    family = native_family(source.config)
    assert family is not None
    copies = {family.named(copied, source.config) for copied in family.copies}
    given = layer.tensors()
    assert given.keys() == set(prediction_names(source.headers, source.config)) - copies
    for stored, tensor in given.items():
        assert tensor.dtype == source.read(stored).dtype
        assert torch.equal(tensor, source.read(stored)), stored
    shared = {id(parameter) for parameter in target.parameters()}
    assert not shared & {id(parameter) for parameter in layer.parameters()}


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3"])
def test_it_computes_in_the_targets_dtype(name: str, tmp_path: Path) -> None:
    """In bfloat16 near what fp32 gives, from the very same values; routers' corrections stay in fp32."""
    source, target, layer = opened(name, tmp_path)
    narrow = PredictionLayer(source, target, torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in narrow.buffers()} <= {torch.float32}
    given = layer.tensors()
    assert all(torch.equal(tensor, given[stored]) for stored, tensor in narrow.tensors().items())
    ids_1T = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(1))
    hidden_1TD = hidden_of(target, ids_1T)
    found, wanted = (slots(one, ids_1T, hidden_1TD)[1] for one in (narrow, layer))
    assert found.dtype == torch.bfloat16
    # A router may choose another expert for a token; most are off by rounding alone.
    apart_T = (found.float() - wanted).norm(dim=-1)[0] / wanted.norm(dim=-1)[0]
    assert float(apart_T.median()) < 0.02


class _Changed:
    """A source that lacks a tensor, has one of another shape, or one more."""

    def __init__(self, inner: FolderSource, **headers: Any) -> None:
        self._inner = inner
        self.headers = {**inner.headers, **headers}
        self.headers = {name: header for name, header in self.headers.items() if header is not None}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mtp.fc.weight": None}, "no tensor for projection.weight"),
        ({"mtp.layers.0.mlp.experts.2.up_proj.weight": None}, "mtp|experts|tensor|shape"),
        ({"mtp.norm.weight": (31,)}, r"mtp.norm.weight has the shape \[31\]"),
        ({"mtp.layers.0.self_attn.o_proj.weight": (3, 4)}, "o_proj"),
        ({"mtp.layers.0.self_attn.q_scale.weight": (4,)}, "no place for mtp.layers.0.self_attn.q_scale"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A missing tensor, one of another shape, and one that the layer has no place for."""
    from compressor.spec import TensorHeader

    source, target, _ = opened("qwen3_next", tmp_path)
    headers = {
        name: None if shape is None else TensorHeader(name, "BF16", shape) for name, shape in changed.items()
    }
    with pytest.raises(CheckpointError, match=message):
        PredictionLayer(_Changed(source, **headers), target)  # type: ignore[arg-type]


def test_further_layers_are_left_alone(tmp_path: Path) -> None:
    """Engines apply the first layer only: the tensors of a second are neither read nor in the way."""
    from compressor.spec import TensorHeader

    source, target, _ = opened("qwen3_next", tmp_path)
    more = {
        name.replace("mtp.layers.0", "mtp.layers.1"): TensorHeader(
            name.replace("mtp.layers.0", "mtp.layers.1"), header.dtype, header.shape
        )
        for name, header in source.headers.items()
        if name.startswith("mtp.layers.0.")
    }
    layer = PredictionLayer(_Changed(source, **more), target)  # type: ignore[arg-type]
    assert not any(".layers.1." in name for name in layer.tensors())
