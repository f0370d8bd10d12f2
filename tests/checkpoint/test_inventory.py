"""Inventories of any checkpoint folder, hostile ones included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoint.inventory import take_inventory
from compressor.errors import CheckpointError


def checkpoint(folder: Path, config: object) -> Path:
    """A folder with one tensor and this config.json."""
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    """Names, bytes and the quantization, which a source would refuse."""
    quantization = {"config_groups": {"group_0": {"weights": None}}}
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    found = take_inventory(checkpoint(tmp_path, config))
    assert found.architectures == ("LlamaForCausalLM",)
    assert (found.tensors, found.bytes, found.kinds[0].leaf) == (1, 32, "up_proj.weight")
    assert found.quantization == quantization


@pytest.mark.parametrize(
    "config, message",
    [
        ([], "not a JSON object"),
        ({"architectures": 5}, "architectures is 5"),
        ({"architectures": [["x"]]}, "not a list of names"),
        ({"model_type": ["x"]}, "model_type is"),
        ({"quantization_config": [1]}, "quantization_config is not laid out as one"),
        ({"quantization_config": {"config_groups": [1]}}, "quantization_config is not laid out as one"),
        ({"quantization_config": {"config_groups": {"a": 1}}}, "quantization_config is not laid out as one"),
        (
            {"quantization_config": {"config_groups": {"a": {"weights": 1}}}},
            "quantization_config is not laid out as one",
        ),
    ],
)
def test_refuses_hostile_configs(tmp_path: Path, config: Any, message: str) -> None:
    """With a message, never another exception."""
    with pytest.raises(CheckpointError, match=message):
        take_inventory(checkpoint(tmp_path, config))


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    """A config.json or an index that is a folder is missing."""
    folder = checkpoint(tmp_path, {})
    (folder / "model.safetensors.index.json").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json is missing"):
        take_inventory(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        take_inventory(folder)
