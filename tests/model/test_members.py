"""Matrices that a checkpoint stores fused, and the layers that they hold."""

from __future__ import annotations

import pytest
import transformers

from compressor.errors import CheckpointError
from compressor.model.families import BUILTINS, family_for, member_rows
from compressor.schemes.fp8 import Fp8Block
from compressor.spec import LinearPart, TensorHeader


@pytest.mark.parametrize(
    "leaf, rows, config, expected",
    [
        ("mlp.gate_up_proj", 384, {}, (192, 192)),
        ("mlp.down_proj", 384, {}, (384,)),
        ("self_attn.q_proj", 384, {"num_attention_heads": 4}, (384,)),
        ("self_attn.qkv_proj", 256, {"num_attention_heads": 6, "num_key_value_heads": 1}, (192, 32, 32)),
        ("self_attn.qkv_proj", 96, {"text_config": {"num_attention_heads": 4}}, (32, 32, 32)),
        ("self_attn.qkv_proj", 96, {}, (96,)),
        ("self_attn.qkv_proj", 96, {"num_attention_heads": "4"}, (96,)),
        ("self_attn.qkv_proj", 97, {"num_attention_heads": 4}, (97,)),
    ],
)
def test_rows_of_the_members_of_a_matrix_stored_fused(leaf, rows, config, expected):
    """Halves of gate/up; q, k and v by their heads; what the config does not tell counts as one."""
    assert member_rows(LinearPart(f"model.layers.0.{leaf}", rows, 64), config) == expected


def test_phi3_is_split_as_its_config_says(tmp_path):
    """The members' rows are those that transformers' attention and MLP slice."""
    config = transformers.Phi3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    layer = transformers.Phi3ForCausalLM(config).model.layers[0]
    rows = {
        name: member_rows(
            LinearPart(f"model.layers.0.{name}", *layer.get_submodule(name).weight.shape), config.to_dict()
        )
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    }
    assert rows == {
        "self_attn.qkv_proj": (32, 8, 8),
        "self_attn.o_proj": (32,),
        "mlp.gate_up_proj": (48, 48),
    }


def test_block_fp8_asks_whether_a_matrix_stored_fused_is_divisible():
    """Phi-3's fused projections whose rows end within a block of 128 are refused, a lone one is not."""

    def problem(name: str) -> str | None:
        header = TensorHeader(f"model.layers.0.{name}.weight", "BF16", (192, 128))
        (part,) = BUILTINS[0].role(header, {"model_type": "phi3"}).parts
        fused = part.fuse_group is not None
        return Fp8Block().problem(part.out_features, part.in_features, fused=fused)

    assert "not a multiple of 128" in (problem("self_attn.qkv_proj") or "")
    assert "not a multiple of 128" in (problem("mlp.gate_up_proj") or "")
    assert problem("self_attn.o_proj") is None


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("gate_up_proj", (3, 32, 97), "its 97 columns do not split into gate and up"),
        ("gate_up_proj", (2**40, 0, 2), "no model has experts of the shape"),
        ("down_proj", (2**40, 1, 1), "no model has experts of the shape"),
        ("down_proj", (0, 48, 32), "no model has experts of the shape"),
    ],
)
def test_llama4_experts_of_impossible_shapes_are_refused(name, shape, message):
    """No column is lost in silence, and no header makes a trillion parts."""
    tensor = f"model.layers.1.feed_forward.experts.{name}"
    with pytest.raises(CheckpointError, match=message) as caught:
        family_for({"model_type": "llama4_text"}).role(TensorHeader(tensor, "BF16", shape), {})
    assert tensor in str(caught.value)
