"""ModelOpt's dialect: configs as NVIDIA/Model-Optimizer@0.47.0 itself wrote them, headers, refusals.

The configs below are hf_quant_config.json and ``quantization_config`` of ``export_hf_checkpoint``, for models
of ``tests.tiny`` quantized with its own presets (named at each); ``producer`` is left out.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.modelopt import algorithm_for, to_compressed_tensors
from compressor.checkpoint.safetensors_file import safetensors_dtype
from compressor.dialects import DIALECTS
from compressor.dialects.base import Modules
from compressor.dialects.modelopt import exclude_modules
from compressor.model.families import family_for
from compressor.numerics.input_ranges import RangeSums
from compressor.planner.claims import claim_tensors
from compressor.recipe.model import WeightsSection
from compressor.schemes import BUILTIN_SCHEMES, parse_scheme
from compressor.schemes.base import Scheme
from compressor.spec import LinearPart
from compressor.stages.modules import modules_of
from tests.tiny import tiny_llama, tiny_llama4

MODELOPT = DIALECTS["modelopt"]
KINDS = ["nvfp4a16", "nvfp4", "fp8_dynamic", "fp8_block", "fp8_static"]
ENDS = ["lm_head", "model.embed_tokens"]
FLOAT4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
NVFP4_GROUP = {"weights": FLOAT4}


def _describe(folder: Path, weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``quantization`` of hf_quant_config.json and ``quantization_config``, without their producers."""
    source = FolderSource(folder)
    section = WeightsSection.model_validate(weights)
    claims = claim_tensors(source.headers, source.config, family_for(source.config), section, MODELOPT)
    described = MODELOPT.describe(modules_of(source, claims))
    (name, written), = described.files.items()  # fmt: skip
    config = dict(described.quantization_config)
    producer = {"name": "compressor", "version": version("compressor")}
    assert name == "hf_quant_config.json"
    assert written.keys() == {"producer", "quantization"}
    assert written["producer"] == config.pop("producer") == producer
    return dict(written["quantization"]), config


@pytest.mark.parametrize(
    ("kind", "algorithm", "groups"),
    [
        # W4A16_NVFP4_CFG
        (
            "nvfp4a16",
            {"quant_algo": "W4A16_NVFP4", "group_size": 16},
            {"config_groups": {"group_0": NVFP4_GROUP | {"targets": ["Linear"]}}},
        ),
        # NVFP4_DEFAULT_CFG
        (
            "nvfp4",
            {"quant_algo": "NVFP4", "group_size": 16},
            {
                "config_groups": {
                    "group_0": {"input_activations": FLOAT4, "weights": FLOAT4, "targets": ["Linear"]}
                }
            },
        ),
        # FP8_DEFAULT_CFG
        (
            "fp8_static",
            {"quant_algo": "FP8"},
            {
                "config_groups": {
                    "group_0": {"input_activations": FLOAT8, "weights": FLOAT8, "targets": ["Linear"]}
                }
            },
        ),
        # FP8_PER_CHANNEL_PER_TOKEN_CFG
        ("fp8_dynamic", {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, {}),
        # FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG
        ("fp8_block", {"quant_algo": "fp8_pb_wo"}, {}),
    ],
)
def test_configs_of_one_algorithm(
    kind: str, algorithm: dict[str, Any], groups: dict[str, Any], tmp_path: Path
) -> None:
    """All linear layers of a Llama but its head."""
    quantization, config = _describe(tiny_llama(tmp_path, hidden=256), {"scheme": kind})
    assert quantization == {"kv_cache_quant_algo": None, "exclude_modules": ENDS} | algorithm
    assert config == groups | {
        "ignore": ENDS,
        "quant_algo": algorithm["quant_algo"],
        "quant_method": "modelopt",
    }


def test_unquantized_branches_are_summarized(tmp_path: Path) -> None:
    """NVFP4_MLP_WEIGHT_ONLY_CFG: attention stays in 16 bit."""
    quantization, config = _describe(tiny_llama(tmp_path), {"scheme": "nvfp4a16", "ignore": ["*self_attn*"]})
    excluded = [*ENDS, "model.layers.0.self_attn*", "model.layers.1.self_attn*"]
    assert quantization["exclude_modules"] == config["ignore"] == excluded


def test_routers_are_excluded(tmp_path: Path) -> None:
    """W4A16_NVFP4_CFG on a Llama 4 whose second layer has experts."""
    quantization, _ = _describe(tiny_llama4(tmp_path, moe_step=2), {"scheme": "nvfp4a16"})
    assert quantization["exclude_modules"] == [*ENDS, "model.layers.1.feed_forward.router"]


def test_experts_that_stay_fused_are_excluded_by_their_module(tmp_path: Path) -> None:
    """vLLM asks for ``experts``; no tensor of this module has a name below it."""
    quantization, _ = _describe(
        tiny_llama4(tmp_path, moe_step=2), {"scheme": "nvfp4a16", "ignore": ["*.experts.*"]}
    )
    excluded = ["model.layers.1.feed_forward.experts*", "model.layers.1.feed_forward.router"]
    assert quantization["exclude_modules"] == [*ENDS, *excluded]


def test_a_mixture_names_each_module(tmp_path: Path) -> None:
    """``process_layer_quant_config`` and ``convert_hf_quant_config_format`` of the same layers.

    But for the excluded modules: ModelOpt leaves them out of a mixture.
    """
    quantization, config = _describe(
        tiny_llama(tmp_path, layers=1, hidden=128),
        {
            "scheme": "nvfp4a16",
            "rules": [
                {"match": ["*.q_proj", "*.k_proj", "*.v_proj"], "scheme": "fp8_dynamic"},
                {"match": ["*.gate_proj", "*.up_proj"], "scheme": "fp8_block"},
                {"match": "*.o_proj", "scheme": "copy"},
            ],
        },
    )
    layer = "model.layers.0"
    attention = [f"{layer}.self_attn.{name}_proj" for name in "kqv"]
    layers = (
        {name: {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"} for name in attention}
        | {f"{layer}.mlp.{name}_proj": {"quant_algo": "fp8_pb_wo"} for name in ("gate", "up")}
        | {f"{layer}.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    )
    excluded = [*ENDS, f"{layer}.self_attn.o_proj"]
    assert quantization == {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "quantized_layers": layers,
        "exclude_modules": excluded,
    }
    groups = config.pop("config_groups")
    assert sorted(groups.values(), key=lambda group: str(group["targets"])) == [
        NVFP4_GROUP | {"targets": [f"{layer}.mlp.down_proj"]},
        {"quant_algo": "fp8_pb_wo", "targets": [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]},
        {
            "input_activations": FLOAT8,
            "weights": FLOAT8 | {"strategy": "channel"},
            "targets": attention,
        },
    ]
    assert config == {
        "quantized_layers": layers,
        "ignore": excluded,
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "modelopt",
    }


def test_a_branch_never_covers_a_quantized_module() -> None:
    """``layers.1*`` would take layers 10 to 19 along, ``mlp.gate*`` the gate projection."""
    unquantized = ["m.layers.1.a.x", "m.layers.1.b.x", "m.layers.2.mlp.gate", "v.a.b", "v.c"]
    quantized = ["m.layers.10.a.x", "m.layers.2.mlp.gate_proj"]
    assert exclude_modules(unquantized, quantized) == ["m.layers.1.*", "m.layers.2.mlp.gate", "v*"]
    assert exclude_modules(["a.b.c"], ["a.bd.c", "a.b"]) == ["a.b.c"]


@pytest.mark.parametrize("cls", BUILTIN_SCHEMES, ids=lambda cls: str(cls.model_fields["kind"].default))
def test_what_it_cannot_hold_it_says(cls: Any) -> None:
    """NVFP4 and FP8 have a form; MXFP4 and integers have none in this dialect."""
    scheme = cls()
    problem = MODELOPT.problem(scheme)
    if scheme.kind in KINDS:
        assert problem is None
    else:
        assert problem == (
            f"{scheme.label} has no form in ModelOpt's dialect, which holds "
            "NVFP4A16, NVFP4, FP8, FP8_DYNAMIC, FP8_BLOCK"
        )
    assert DIALECTS["compressed-tensors"].problem(scheme) is None


def _input_tensors(scheme: Scheme) -> dict[str, torch.Tensor]:
    heard = RangeSums(128, "cpu")
    heard.add(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)))
    return scheme.input_tensors(heard.result())


def test_input_scales_are_the_engines_factors() -> None:
    """amax / (448 * 6) for NVFP4, where compressed-tensors has the divisor; for FP8 both have the factor.

    And back again to the same bits.
    """
    for kind, local in (("nvfp4", "input_global_scale"), ("fp8_static", "input_scale")):
        scheme = parse_scheme(kind)
        weight_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        (scales,) = scheme.fit([weight_OI], search="full")
        ours = scheme.encode(weight_OI, scales) | _input_tensors(scheme)
        theirs = MODELOPT.spell(scheme, ours)
        factor = float(ours[local]) if kind == "fp8_static" else 1 / float(ours[local])
        assert theirs["input_scale"].shape == ()
        assert float(theirs["input_scale"]) == factor
        algorithm = algorithm_for(scheme.label)
        assert algorithm is not None
        back = to_compressed_tensors(algorithm, theirs)
        assert back.keys() == ours.keys()
        for name, tensor in ours.items():
            assert back[name].shape == tensor.shape
            assert torch.equal(back[name].float(), tensor.float()), name


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_claimed_is_what_is_spelled(kind: str, name: Any) -> None:
    """Names, dtypes and shapes of the plan's headers are those of the tensors written."""
    dialect, scheme = DIALECTS[name], parse_scheme(kind)
    weight_OI = torch.randn(64, 128).bfloat16()
    (scales,) = scheme.fit([weight_OI], search="minmax")
    spelled = dialect.spell(scheme, scheme.encode(weight_OI, scales) | _input_tensors(scheme))
    claimed = dialect.outputs(scheme, LinearPart("a.b", 64, 128), dtype="BF16")
    assert {(header.name, header.dtype, header.shape) for header in claimed} == {
        (f"a.b.{local}", safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for local, tensor in spelled.items()
    }


def test_fp8_experts_come_with_a_warning() -> None:
    """vLLM reads one scale a matrix for them; NVFP4 experts it serves."""
    expert = ["m.experts.0.up_proj"]
    fp8 = Modules({parse_scheme("fp8_block"): expert, parse_scheme("nvfp4a16"): ["m.q_proj"]}, [])
    (warning,) = MODELOPT.warnings(fp8)
    assert "cannot serve experts of FP8_BLOCK in" in warning
    for kind in ("nvfp4a16", "nvfp4", "fp8_static"):
        assert MODELOPT.warnings(Modules({parse_scheme(kind): expert}, [])) == []
    assert MODELOPT.warnings(Modules({parse_scheme("fp8_block"): ["m.q_proj"]}, [])) == []
    assert DIALECTS["compressed-tensors"].warnings(fp8) == []
