"""The written quantization_config: exact groups, targets and ignore lists, as the library reads them."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from compressor.checkpoint.hf_config import quantization_config, result_config
from compressor.schemes import parse_scheme

LAYERS = [
    f"model.layers.{i}.{m}" for i in range(12) for m in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
]


def test_one_scheme_targets_linear() -> None:
    """The library's own spelling for a uniform model."""
    config = quantization_config({parse_scheme("nvfp4a16"): LAYERS}, ["lm_head"], frozenset())
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    assert config["format"] == "nvfp4-pack-quantized"
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"


def test_mixed_schemes_target_exactly_their_modules() -> None:
    """Each module matches the targets of its own group only; the library parses the whole."""
    down = [name for name in LAYERS if name.endswith("down_proj")]
    rest = [name for name in LAYERS if not name.endswith("down_proj")]
    config = quantization_config(
        {parse_scheme("fp8_dynamic"): down, parse_scheme("nvfp4a16"): rest}, ["lm_head"], frozenset()
    )
    parsed = QuantizationConfig.model_validate(config)
    groups = list(parsed.config_groups.values())
    for names, group, other in ((down, groups[0], groups[1]), (rest, groups[1], groups[0])):
        for name in names:
            assert any(match_name(name, target) for target in group.targets)
            assert not any(match_name(name, target) for target in other.targets)
    assert config["format"] == "mixed-precision"
    assert {group.format for group in groups} == {"float-quantized", "nvfp4-pack-quantized"}


def test_ignored_layers_are_not_targets_of_others() -> None:
    """Modules left in 16 bit match the ignore list; quantized ones do not."""
    left = [name for name in LAYERS if ".layers.0." in name] + ["lm_head"]
    quantized = [name for name in LAYERS if name not in left]
    config = quantization_config({parse_scheme("int8"): quantized}, left, frozenset())
    for name in [*left, *quantized]:
        assert any(match_name(name, entry) for entry in config["ignore"]) == (name in left), name


def test_quantized_embedding_is_named() -> None:
    """An embedding is no Linear: it must be a target by name."""
    config = quantization_config(
        {parse_scheme("int8"): [*LAYERS, "model.embed_tokens"]},
        ["lm_head"],
        frozenset({"model.embed_tokens"}),
    )
    targets = config["config_groups"]["group_0"]["targets"]
    assert any(match_name("model.embed_tokens", target) for target in targets)
    assert not any(match_name("lm_head", target) for target in targets)


@pytest.mark.parametrize("narrowed", [True, False])
def test_other_fields_survive(narrowed: bool) -> None:
    """Everything else is carried; the dtype changes only where wide weights were stored in 16 bit."""
    source = {"rope_parameters": {"rope_theta": 5e5}, "torch_dtype": "float32", "odd_field": [1, None]}
    config = result_config(source, {"quant_method": "x"}, narrowed=narrowed)
    assert config["rope_parameters"] == {"rope_theta": 5e5}
    assert config["odd_field"] == [1, None]
    assert config.get("dtype") == ("bfloat16" if narrowed else None)
    assert ("torch_dtype" in config) != narrowed
    assert "quantization_config" not in source
