"""ModelOpt's tensors and configs as compressed-tensors knows them, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.checkpoint.modelopt import (
    ALGORITHMS,
    Algorithm,
    Description,
    algorithm_for,
    local_names,
    modelopt_headers,
    to_compressed_tensors,
    to_modelopt,
)
from compressor.checkpoint.safetensors_file import safetensors_dtype
from compressor.errors import CheckpointError
from compressor.schemes import parse_scheme
from compressor.spec import TensorHeader
from tests.model.compressed import fp8, fp8_block, nvfp4

MAKERS = {"NVFP4A16": nvfp4, "FP8_DYNAMIC": fp8, "FP8_BLOCK": fp8_block}

# What NVIDIA/Model-Optimizer@0.47.0 NVFP4QTensor.quantize makes of a matrix [2, 32] in blocks of 16: packed
# codes, the bytes of the E4M3 scales, the bits of weight_scale_2; and what its dequantize makes of those.
PACKED = [
    [31, 78, 94, 108, 122, 240, 226, 212, 198, 150, 23, 78, 94, 108, 122, 248],
    [47, 78, 109, 123, 248, 227, 213, 166, 23, 79, 94, 108, 249, 226, 212, 182],
]
SCALE = [[110, 126], [85, 85]]
SCALE_2_BITS = 993950184
FIRST_ROW = [
    *(-1.953125, 0.1630859375, -1.3046875, 0.65234375, -1.3046875, 0.9765625, -0.65234375, 1.3046875),
    *(-0.326171875, 1.953125, 0.0, -1.953125, 0.326171875, -1.3046875, 0.65234375, -0.9765625),
    *(5.21875, -2.609375, 5.21875, -0.65234375, 7.8125, 0.65234375, -5.21875, 2.609375),
    *(-5.21875, 3.90625, -2.609375, 5.21875, -1.3046875, 7.8125, 0.0, -7.8125),
]


def _algorithm(preset: str) -> Algorithm:
    found = algorithm_for(preset)
    assert found is not None
    return found


@pytest.mark.parametrize("preset", MAKERS)
def test_there_and_back(preset: str) -> None:
    """Codes and block scales keep their bits, FP8 scales their values; the shapes are ModelOpt's."""
    tensors, _ = MAKERS[preset](192, 256)
    tensors = {name: tensor.bfloat16() if "FP8" in preset and name == "weight_scale" else tensor
               for name, tensor in tensors.items()}  # fmt: skip
    algorithm = _algorithm(preset)
    spelled = to_modelopt(algorithm, tensors)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in spelled.items()}
    assert (
        shapes
        == {
            "NVFP4A16": {
                "weight": (torch.uint8, (192, 128)),
                "weight_scale": (torch.float8_e4m3fn, (192, 16)),
                "weight_scale_2": (torch.float32, ()),
            },
            "FP8_DYNAMIC": {
                "weight": (torch.float8_e4m3fn, (192, 256)),
                "weight_scale": (torch.float32, (192,)),
            },
            "FP8_BLOCK": {
                "weight": (torch.float8_e4m3fn, (192, 256)),
                "weight_scale": (torch.float32, (2, 1, 2, 1)),
            },
        }[preset]
    )
    assert set(local_names(algorithm)) == set(spelled)
    back = to_compressed_tensors(algorithm, spelled)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        # Two roundings of a reciprocal: at most two units in the last place.
        torch.testing.assert_close(
            back[name].float(), tensor.float(), rtol=2.0**-22 if "global" in name else 0, atol=0
        )


@pytest.mark.parametrize("kind", ["nvfp4a16", "fp8_dynamic", "fp8_block"])
def test_headers_are_those_of_the_tensors(kind: str) -> None:
    """What the plan claims is what is written, for matrices that end within a block as well."""
    scheme = parse_scheme(kind)
    weight_OI = torch.randn(192, 256).bfloat16()
    algorithm = _algorithm(scheme.label)
    (scales,) = scheme.fit([weight_OI], search="minmax")
    spelled = to_modelopt(algorithm, scheme.encode(weight_OI, scales))
    claimed = modelopt_headers(
        algorithm,
        {header.name.removeprefix("m."): header for header in scheme.outputs("m", 192, 256, dtype="BF16")},
    )
    written = {
        name: (safetensors_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in spelled.items()
    }
    assert {name: (header.dtype, header.shape) for name, header in claimed.items()} == written
    assert all(isinstance(header, TensorHeader) for header in claimed.values())


def test_nvfp4_means_what_modelopt_says_it_means() -> None:
    """Tensors that ModelOpt quantized decode to the values that it decodes them to, bit for bit."""
    from compressed_tensors.compressors import BaseCompressor

    algorithm = _algorithm("NVFP4A16")
    local = to_compressed_tensors(
        algorithm,
        {
            "weight": torch.tensor(PACKED, dtype=torch.uint8),
            "weight_scale": torch.tensor(SCALE, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(SCALE_2_BITS, dtype=torch.int32).view(torch.float32),
        },
    )
    compressor = BaseCompressor.get_value_from_registry(algorithm.format)
    decoded = compressor.decompress(local, algorithm.ct_scheme([]))["weight"]
    assert decoded[0].tolist() == FIRST_ROW


def test_the_second_scale_is_what_an_engine_makes_of_the_first_dialect() -> None:
    """vLLM inverts ``weight_global_scale`` in fp32 on loading: ``weight_scale_2`` has exactly these bits."""
    tensors, _ = nvfp4(16, 32)
    for divisor in (37.3, 1e-4, 123456.7, 3.0, 1.9999999):
        tensors["weight_global_scale"] = torch.tensor([divisor])
        spelled = to_modelopt(_algorithm("NVFP4A16"), tensors)["weight_scale_2"]
        assert torch.equal(spelled, 1.0 / tensors["weight_global_scale"][0])


def test_a_scale_without_dimensions_is_that_of_one_block() -> None:
    """ModelOpt squeezes the scale of a matrix of one block (seen of 128 x 128)."""
    tensors = {"weight": torch.zeros(128, 128).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5)}
    assert to_compressed_tensors(_algorithm("FP8_BLOCK"), tensors)["weight_scale"].tolist() == [[0.5]]
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        to_compressed_tensors(_algorithm("FP8_DYNAMIC"), tensors)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("nested", [True, False])
def test_one_algorithm_serves_every_module(algorithm: Algorithm, nested: bool) -> None:
    """Both spellings of the config, and either case of the name, as engines read them."""
    for name in (algorithm.name, algorithm.name.lower(), algorithm.name.upper()):
        config = {"quant_algo": name, "group_size": algorithm.group_size}
        described = Description({"quantization": config} if nested else config, "here")
        assert described.algorithm("any.module") == algorithm
        scheme = algorithm.ct_scheme(["Linear"])
        assert scheme.targets == ["Linear"]
        assert scheme.format == algorithm.format


def test_mixed_precision_asks_the_module_then_what_it_lies_in() -> None:
    """A container of experts may stand for all of them."""
    layers = {"a.q_proj": {"quant_algo": "fp8_pb_wo"}, "a.experts": {"quant_algo": "W4A16_NVFP4"}}
    described = Description({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}, "here")
    assert described.algorithm("a.q_proj").preset == "FP8_BLOCK"
    assert described.algorithm("a.experts.3.up_proj").preset == "NVFP4A16"
    with pytest.raises(CheckpointError, match="quantized_layers does not name it") as caught:
        described.algorithm("a.k_proj")
    assert caught.value.where == "a.k_proj"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_algo": "W4A16_AWQ"}, "'W4A16_AWQ' is not read here; read: W4A16_NVFP4"),
        ({"quant_algo": None}, "'None' is not read here"),
        ({"quant_algo": "W4A16_NVFP4", "group_size": 32}, "blocks of 32; only 16 is read"),
        ({"quantization": [1]}, "not laid out as ModelOpt's"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": ["a"]}, "not laid out as ModelOpt's"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}}, "not laid out as ModelOpt's"),
    ],
)
def test_what_is_not_read_is_named(config: dict[str, Any], reason: str) -> None:
    """Other algorithms, other block sizes and broken configs."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        Description(config, "config.json").algorithm("a")
    assert caught.value.where == "config.json"
