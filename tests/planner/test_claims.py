"""Claims: each tensor to one rule, every fault at once."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.dialects import DIALECTS
from compressor.errors import PlanError
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.recipe.model import WeightsSection
from compressor.spec import TensorHeader
from compressor.stages.base import Claim

from .fakes import LLAMA, LLAMA4, llama4_headers, llama_headers


def _claims(
    weights: dict[str, Any], headers: dict[str, TensorHeader] | None = None, config: dict[str, Any] = LLAMA
) -> dict[str, Claim]:
    section = WeightsSection.model_validate(weights)
    claims = claim_tensors(
        headers or llama_headers(), config, family_for(config), section, DIALECTS["compressed-tensors"]
    )
    return {claim.tensor.name: claim for claim in claims}


def _faults(*arguments: Any, **named: Any) -> str:
    with pytest.raises(PlanError) as caught:
        _claims(*arguments, **named)
    return str(caught.value)


def test_every_tensor_is_claimed_once_in_file_order() -> None:
    """Linear layers are quantized, ends and norms stay, and the order is the file's."""
    claims = _claims({"scheme": "nvfp4a16"})
    assert list(claims) == list(llama_headers())
    quantized = {name for name, claim in claims.items() if claim.action == "quantize"}
    assert len(quantized) == 2 * 7
    assert all("_proj" in name for name in quantized)
    assert claims["lm_head.weight"].reason
    assert claims["model.norm.weight"].outputs == (claims["model.norm.weight"].tensor,)


def test_first_matching_rule_wins_and_ignore_comes_first() -> None:
    """ignore beats rules, an earlier rule beats a later one, the rest takes the default scheme."""
    claims = _claims(
        {
            "scheme": "nvfp4a16",
            "ignore": ["*.layers.0.mlp.down_proj"],
            "rules": [
                {"match": "*.mlp.down_proj", "scheme": "fp8_dynamic"},
                {"match": "re:.*layers\\.1\\..*down_proj", "scheme": {"kind": "int4", "group_size": 32}},
            ],
        }
    )
    assert claims["model.layers.0.mlp.down_proj.weight"].rule == "weights.ignore.0"
    second = claims["model.layers.1.mlp.down_proj.weight"]
    assert second.rule == "weights.rules.0"
    assert second.scheme is not None
    assert second.scheme.kind == "fp8_dynamic"
    assert claims["model.layers.1.mlp.up_proj.weight"].rule == "weights.scheme"


def test_all_faults_are_reported_together() -> None:
    """Unmatched patterns, shapes and split fusions come in one error."""
    text = _faults(
        {
            "scheme": {"kind": "int4", "group_size": 128},
            "ignore": ["*.no_such_thing"],
            "rules": [{"match": "*.q_proj", "scheme": "fp8_dynamic"}],
        },
        llama_headers(hidden=192),
    )
    assert "'*.no_such_thing' matches no tensor" in text
    assert "weights.scheme" in text
    assert "192" in text
    assert "fuses" in text


def test_norms_cannot_be_quantized() -> None:
    """A rule that reaches for a norm is a fault that names the tensor."""
    text = _faults({"scheme": "nvfp4a16", "rules": [{"match": "model.norm", "scheme": "fp8_dynamic"}]})
    assert "cannot be quantized (norm): model.norm.weight" in text


def test_head_may_be_claimed_unless_tied() -> None:
    """lm_head takes FP8 on request; a tied embedding is refused with the reason."""
    rules = {"scheme": "nvfp4a16", "rules": [{"match": "lm_head", "scheme": "fp8_dynamic"}]}
    assert _claims(rules)["lm_head.weight"].action == "quantize"
    tied = {"scheme": "nvfp4a16", "rules": [{"match": "model.embed_tokens", "scheme": "int8"}]}
    text = _faults(tied, llama_headers(tied=True), LLAMA | {"tie_word_embeddings": True})
    assert "model.embed_tokens.weight" in text


def test_nothing_to_quantize_is_a_fault() -> None:
    """A recipe that ignores everything would publish a copy."""
    assert "nothing to quantize" in _faults({"scheme": "nvfp4a16", "ignore": ["*_proj"]})


def test_experts_are_split_and_must_agree() -> None:
    """Fused experts give three matrices each; different schemes within a layer are a fault."""
    claims = _claims({"scheme": "nvfp4a16"}, llama4_headers(), LLAMA4)
    fused = claims["model.layers.0.feed_forward.experts.gate_up_proj"]
    assert len(fused.role.parts) == 2 * 4
    assert fused.outputs[0].name.startswith("model.layers.0.feed_forward.experts.0.gate_proj.")
    split = {"scheme": "nvfp4a16", "rules": [{"match": "*.experts.down_proj", "scheme": "fp8_dynamic"}]}
    assert "all experts of a layer" in _faults(split, llama4_headers(), LLAMA4)


@pytest.mark.parametrize(
    "weights",
    [
        {"ignore": ["*.experts.0.*"]},
        {"rules": [{"match": "*.experts.[0-2].*", "scheme": "fp8_dynamic"}]},
        {"rules": [{"match": ["*.experts.*.gate_proj", "*.experts.*.down_proj"], "scheme": "fp8_dynamic"}]},
        {"rules": [{"match": "*.experts.1.*", "scheme": "nvfp4a16", "solver": "gptq"}]},
    ],
)
def test_a_part_of_a_tensor_is_no_tensor(weights: dict[str, Any]) -> None:
    """Patterns that match some of the experts in one tensor do not decide about the others in silence."""
    assert "some of the matrices that one tensor holds" in _faults(
        {"scheme": "nvfp4a16", **weights}, llama4_headers(), LLAMA4
    )


def test_experts_may_be_matched_one_by_one() -> None:
    """By several patterns, or several entries, that together store all of them alike."""
    each = [f"*.experts.{expert}.*" for expert in range(4)]
    for weights in ({"ignore": each}, {"rules": [{"match": each, "scheme": "fp8_dynamic"}]}):
        claims = _claims({"scheme": "nvfp4a16", **weights}, llama4_headers(), LLAMA4)
        rule = claims["model.layers.0.feed_forward.experts.gate_up_proj"].rule
        assert rule == f"weights.{'ignore' if 'ignore' in weights else 'rules'}.0"


def test_experts_left_in_16_bit_beside_quantized_ones_are_written_one_by_one() -> None:
    """The engine's loader takes all experts for fused once it has met one fused tensor."""
    weights = {"scheme": "nvfp4a16", "ignore": ["*.layers.1.feed_forward.experts.*"]}
    kept = _claims(weights, llama4_headers(), LLAMA4)["model.layers.1.feed_forward.experts.down_proj"]
    assert kept.action == "copy"
    assert [output.name for output in kept.outputs][:2] == [
        "model.layers.1.feed_forward.experts.0.down_proj.weight",
        "model.layers.1.feed_forward.experts.1.down_proj.weight",
    ]
    assert kept.outputs[0].shape == (64, 128)
    alone = {"scheme": "nvfp4a16", "ignore": ["*.feed_forward.experts.*"]}
    same = _claims(alone, llama4_headers(), LLAMA4)["model.layers.1.feed_forward.experts.down_proj"]
    assert same.outputs == (same.tensor,)


def test_wide_embeddings_are_stored_in_16_bit() -> None:
    """A 32-bit checkpoint's copied matrices become BF16; its norms stay as they are."""
    wide = {name: TensorHeader(name, "F32", header.shape) for name, header in llama_headers().items()}
    claims = _claims({"scheme": "nvfp4a16"}, wide)
    assert claims["model.embed_tokens.weight"].outputs[0].dtype == "BF16"
    assert claims["model.norm.weight"].outputs[0].dtype == "F32"


def test_what_shares_a_scale_has_one_solver() -> None:
    """q/k/v of NVFP4 are solved together, so a rule for one of them would be ignored; others are free."""
    rules = [{"match": "*.v_proj", "scheme": "nvfp4a16", "solver": "rtn"}]
    text = _faults({"scheme": "nvfp4a16", "solver": "gptq", "rules": rules})
    assert "share a scale among solvers" in text
    assert "v_proj" in text
    free = [{"match": "*.v_proj", "scheme": "int8", "solver": "rtn"}]
    claims = _claims({"scheme": "int8", "solver": "gptq", "rules": free})
    kinds = {name: claim.solver.kind for name, claim in claims.items() if claim.solver}
    assert kinds["model.layers.0.self_attn.v_proj.weight"] == "rtn"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "gptq"


def test_some_projections_are_quantized_by_rules_only() -> None:
    """kv_b_proj of latent attention: 16 bit by default, with the reason; any scheme that a rule names."""
    module = "model.layers.0.self_attn."
    headers = {
        name: TensorHeader(name, "BF16", (64, 64))
        for name in (f"{module}kv_b_proj.weight", f"{module}o_proj.weight")
    }
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1}
    kept = _claims({"scheme": "nvfp4"}, headers, config)[f"{module}kv_b_proj.weight"]
    assert (kept.action, kept.rule) == ("copy", "default")
    assert "engines fold it" in kept.reason
    rules = [{"match": "*.kv_b_proj", "scheme": "fp8_dynamic"}]
    ruled = _claims({"scheme": "nvfp4", "rules": rules}, headers, config)[f"{module}kv_b_proj.weight"]
    assert ruled.scheme is not None
    assert ruled.scheme.label == "FP8_DYNAMIC"
