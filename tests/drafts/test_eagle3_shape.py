"""What a head looks like for a target, and that it turns positions and starts as the target does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.drafts.base import LAST
from compressor.drafts.eagle3 import Eagle3Head, SharedEnds
from compressor.drafts.eagle3_shape import rope_of, shape_for, usual_layers
from compressor.drafts.eagle3_warm import warm_start
from compressor.drafts.unroll import Unroll
from compressor.errors import UserError
from tests.drafts.eagle import LAYERS, Target, make_llama4, make_target

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}
LLAMA4 = {"model_type": "llama4_text", "intermediate_size_mlp": 3072, "head_dim": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0 + step / 4 for step in range(16)],
        "long_factor": [1.0 + step / 4 for step in range(16)],
        "attention_factor": 1.2,
    },
}


def test_layers() -> None:
    """Beginning, middle, end; in few layers, the last ones that there are."""
    assert usual_layers(30) == (2, 15, 27)
    assert usual_layers(6) == (2, 3, 5)
    assert usual_layers(4) == (1, 2, 3)
    assert [usual_layers(depth) for depth in (1, 2, 3)] == [(0,), (0, 1), (0, 1, 2)]
    for depth in range(1, 100):
        found = usual_layers(depth)
        assert list(found) == sorted(set(found))
        assert len(found) == min(3, depth)
        assert found[-1] < depth


def test_sizes() -> None:
    """Those of the target; Llama 4 has several, and experts in some layers."""
    shape = shape_for(CONFIG | {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert shape == shape_for(CONFIG)
    assert (shape.head_dim, shape.kv_heads, shape.intermediate_size, shape.reduced) == (64, 3, 1536, False)
    assert shape_for(CONFIG, draft_vocabulary=8192).tensors()["lm_head.weight"] == (8192, 576)
    experts = shape_for({"model_type": "llama4", "text_config": CONFIG | LLAMA4})
    assert experts.intermediate_size == 1536
    dense = CONFIG | LLAMA4 | {"interleave_moe_layer_step": 4}
    assert shape_for(dense).intermediate_size == 3072
    assert shape_for(CONFIG).parameters == 3 * 576**2 + 4 * 576 + 2 * 576 * (576 + 2 * 192) + 576**2 + (
        3 * 576 * 1536
    )
    assert shape_for(CONFIG | {"num_hidden_layers": 2}).layer_config()["num_aux_hidden_states"] == 2


@pytest.mark.parametrize(
    ("change", "asked", "told"),
    [
        ({"model_type": "gemma3_text"}, {}, "gemma3_text"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "dynamic"),
        ({"rope_parameters": {"rope_type": "proportional"}}, {}, "proportional"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, {}, "different ways"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, {}, "part of each head"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, {}, "switches"),
        ({"hidden_size": True}, {}, "hidden_size"),
        ({"rope_parameters": [1]}, {}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "x"}}, {}, "rope_theta"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, {}, "yarn"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": -1}}, {}, "original"),
        ({"rms_norm_eps": float("nan")}, {}, "rms_norm_eps"),
        (LLAMA4 | {"interleave_moe_layer_step": "x"}, {}, "interleave"),
        ({}, {"draft_vocabulary": 50000}, "49152"),
        ({}, {"layers": (2, 30)}, "0 to 29"),
        ({}, {"layers": (5, 2)}, "increasing"),
    ],
)
def test_refusals(change: dict[str, Any], asked: dict[str, Any], told: str) -> None:
    """With the reason."""
    with pytest.raises(UserError, match=told):
        shape_for(CONFIG | change, **asked)


def test_positions_of_older_configs() -> None:
    """Legacy keys win, as in transformers."""
    assert rope_of({"rope_theta": 5e5}) == {"rope_type": "default", "rope_theta": 5e5}
    assert rope_of({}) == {"rope_type": "default", "rope_theta": 1e4}
    legacy = {"type": "linear", "factor": 2.0}
    both = {"rope_scaling": legacy, "rope_theta": 5e5, "rope_parameters": {"rope_type": "yarn"}}
    yarn = {"rope_type": "yarn", "factor": 2.0}
    found = rope_of({"rope_parameters": yarn, "max_position_embeddings": 64})
    assert found == yarn | {"rope_theta": 1e4, "original_max_position_embeddings": 64}
    assert rope_of(both) == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


@pytest.mark.parametrize("rope_type", ROPES)
@torch.no_grad()
def test_warm_head_is_the_last_layer(rope_type: str, tmp_path: Path) -> None:
    """Fed with what enters the target's last layer, it says what the target says, under its positions."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type]}
    target = make_target(tmp_path / "target", rope=rope)
    assert target.model.config.rope_parameters["rope_type"] == rope_type
    _is_the_last_layer(target, LAYERS - 1)


@torch.no_grad()
def test_warm_frommake_llama4(tmp_path: Path) -> None:
    """Neighbouring dimensions are turned there; a dense layer fits whole."""
    _is_the_last_layer(make_llama4(tmp_path / "target", use_qk_norm=False, interleave_moe_layer_step=3), 1)


def _is_the_last_layer(target: Target, last: int) -> None:
    shape = shape_for(target.config, norm_before_residual=False)
    head = Eagle3Head(shape, target.ends)
    filled = warm_start(head, target.model)
    assert {*filled, "layers.0.input_layernorm.weight"} == set(shape.tensors())
    ids_BT = torch.randint(0, 250, (2, 300), generator=torch.Generator().manual_seed(0))
    hidden = target.hidden(ids_BT, shape.layers)
    assert shape.layers[-1] == last
    out_BSD = Unroll(head, 1).unrolled(ids_BT, hidden)[0]
    # Two implementations of attention in fp32.
    torch.testing.assert_close(head.norm(out_BSD), hidden[LAST][:, :-2], rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_warm_from_experts(tmp_path: Path) -> None:
    """What every token passes is taken; queries and keys that are normed are not."""
    target = make_llama4(tmp_path / "target", use_qk_norm=True, interleave_moe_layer_step=1)
    head = Eagle3Head(shape_for(target.config), target.ends)
    filled = warm_start(head, target.model)
    layer = target.model.model.layers[-1]
    assert torch.equal(head.layer.mlp.up_proj.weight, layer.feed_forward.shared_expert.up_proj.weight)
    assert {name for name in head.shape.tensors() if name not in filled} == {
        "layers.0.input_layernorm.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.k_proj.weight",
    }


def test_no_plain_output_head(tmp_path: Path) -> None:
    """One that adds something cannot be shared."""
    target = make_target(tmp_path / "target", tie=False)
    target.model.lm_head.bias = torch.nn.Parameter(torch.zeros(256))
    with pytest.raises(UserError, match="output head"):
        SharedEnds.of(target.model)
