"""What ``llmcompressor`` writes for a tiny Llama, against what the schemes plan and fit for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.schemes.base import Scheme
from tests.schemes.cases import LABELS, SCHEMES
from tests.schemes.test_golden import same_bytes
from tests.tiny import tiny_llama

FUSED = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
ALONE = [["self_attn.o_proj"], ["mlp.down_proj"]]


@dataclass(frozen=True)
class Written:
    """The library's result for one scheme."""

    headers: dict[str, tuple[str, tuple[int, ...]]]
    tensors: dict[str, torch.Tensor]
    group: dict[str, Any]
    format: str


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama of one layer, all dimensions multiples of 128."""
    folder = tmp_path_factory.mktemp("source")
    tiny_llama(folder, layers=1, hidden=256, intermediate=384, heads=2, kv_heads=1)
    return folder


def _quantized_by_library(scheme: Scheme, source: Path, folder: Path) -> Written:
    described = scheme.ct_scheme(["Linear"])
    if scheme.static_inputs:
        _calibrate_by_library(described, source, folder)
    else:
        model_free_ptq(
            source,
            folder,
            scheme=described,
            ignore=["lm_head", "re:.*embed_tokens$"],
            device="cpu",
            max_workers=1,
        )
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "_proj." in name]  # noqa: SIM118 (no mapping)
        slices = {name: file.get_slice(name) for name in names}
        headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        tensors = {name: file.get_tensor(name) for name in names}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    return Written(headers, tensors, group, config["format"])


def _calibrate_by_library(described: QuantizationScheme, source: Path, folder: Path) -> None:
    """One pass over 4 rows of 32 tokens."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokens = [list(range(start, start + 32)) for start in range(4)]
    shown = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 32} for row in tokens])
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(source),
        dataset=shown,
        num_calibration_samples=4,
        max_seq_length=32,
        recipe=QuantizationModifier(config_groups={"group_0": described}, ignore=["lm_head"]),
    )
    model.save_pretrained(folder, save_compressed=True)


def _weights(source: Path) -> dict[str, torch.Tensor]:
    with safe_open(source / "model.safetensors", "pt") as file:
        return {
            name.removeprefix("model.layers.0.").removesuffix(".weight"): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (no mapping)
            if "_proj." in name
        }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_library_writes_the_same(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    """Names, dtypes, shapes, the config's group and the min-max scales are the library's; so are the codes
    of the formats whose quotients it does not round to bf16 on the way.

    But for fp8_static: its input scale is fp32 here as in engines, and fused matrices share their scale.
    """
    written = _quantized_by_library(scheme, source, tmp_path)
    weights = _weights(source)
    planned = {
        header.name: (header.dtype, header.shape)
        for module, weight in weights.items()
        for header in scheme.outputs(f"model.layers.0.{module}", weight.shape[0], weight.shape[1])
    }
    theirs_in_16_bit = {
        name: (dtype, shape)
        for name, (dtype, shape) in written.headers.items()
        if name.endswith("input_scale")
    }
    assert all(header == ("BF16", (1,)) for header in theirs_in_16_bit.values())
    assert planned == written.headers | dict.fromkeys(theirs_in_16_bit, ("F32", (1,)))
    described = scheme.ct_scheme(["Linear"]).model_dump(mode="json")
    if scheme.static_inputs:  # calibration notes how it chose the weights' scales
        assert written.group["weights"].pop("observer") == "memoryless_minmax"
        described["weights"].pop("observer")
    assert described == written.group
    assert described["format"] == written.format
    for modules in ALONE if scheme.label == "FP8" else FUSED + ALONE:
        fitted = scheme.fit([weights[module] for module in modules], search="minmax")
        for module, scales in zip(modules, fitted, strict=True):
            for local, tensor in scheme.encode(weights[module], scales).items():
                exact = "fp4" in described["format"] or local not in ("weight", "weight_packed")
                theirs = written.tensors[f"model.layers.0.{module}.{local}"]
                assert not exact or same_bytes(tensor, theirs), f"{module}.{local}"
