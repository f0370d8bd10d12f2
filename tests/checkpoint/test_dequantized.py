"""Quantized sources read as bfloat16: every format against the library that defines it; what is refused."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from compressor.checkpoint.base import fetched_files, let_go
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.modelopt import algorithm_for, to_modelopt
from compressor.checkpoint.sources import open_source
from compressor.errors import CheckpointError
from compressor.numerics import groups
from tests.checkpoint.packed_folders import PRESETS, Q_PROJ, Tensors, edit, fp8, read, write
from tests.model.compressed import compress_folder
from tests.tiny import tiny_llama


def _library(tensors: Tensors, folder: Path) -> torch.Tensor:
    """The weight of a module's tensors as compressed-tensors itself decompresses it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    described = QuantizationConfig.model_validate(config)
    compressor = BaseCompressor.get_value_from_registry(described.format)
    decoded: torch.Tensor = compressor.decompress(tensors, described.config_groups["group_0"])["weight"]
    return decoded


@pytest.mark.parametrize("chunk", [groups.CHUNK_VALUES, 1])
@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors(preset: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what the library decompresses, in however many chunks of rows; the rest as it lies."""
    monkeypatch.setattr(groups, "CHUNK_VALUES", chunk)
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    folder = tmp_path / "packed"
    meant = compress_folder(plain, folder, preset)
    stored = load_file(folder / "model.safetensors")
    source, original = open_source(str(folder), from_="dequantize"), open_source(str(plain))
    assert dict(source.headers) == dict(original.headers)
    assert source.config == original.config
    assert source.kind == "dequantized"
    assert source.note.startswith("dequantized from compressed-tensors ")
    for name in source.headers:
        if name in meant:
            prefix = name.removesuffix("weight")
            local = {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}
            assert torch.equal(read(folder, name), _library(local, folder).bfloat16()), name
            row = read(folder, name, 3)
            assert torch.equal(row, read(folder, name)[3])
        else:
            assert torch.equal(source.read(name), stored[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    """Code x scale is exact in fp32 and rounded to bfloat16 once, whatever the scales are stored in."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", "FP8_DYNAMIC")

    def narrow(stored: Tensors) -> None:
        stored[f"{Q_PROJ}.weight_scale"] = stored[f"{Q_PROJ}.weight_scale"].to(dtype)

    edit(tmp_path / "packed", narrow)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    exact = stored[f"{Q_PROJ}.weight"].double() * stored[f"{Q_PROJ}.weight_scale"].double()
    assert torch.equal(read(tmp_path / "packed", f"{Q_PROJ}.weight"), exact.float().bfloat16())


@pytest.mark.parametrize("chunk", [groups.CHUNK_VALUES, 1])
@pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1, 1)])
@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "W8A8"])
def test_a_scale_for_each_row_of_any_shape(
    preset: str, shape: tuple[int, ...], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a square matrix too, and of chunks as long as wide, where the library would scale columns."""
    monkeypatch.setattr(groups, "CHUNK_VALUES", chunk)
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    meant = compress_folder(plain, tmp_path / "packed", preset)
    name = f"{Q_PROJ}.weight_scale"
    edit(tmp_path / "packed", lambda stored: stored.update({name: stored[name].reshape(shape)}))
    found = read(tmp_path / "packed", f"{Q_PROJ}.weight")
    assert found.shape[0] == found.shape[1]
    assert torch.equal(found, meant[f"{Q_PROJ}.weight"].float().bfloat16())


def test_older_configs(tmp_path: Path) -> None:
    """Groups without a format of their own, and a status from before the weights were packed."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    meant = compress_folder(plain, tmp_path / "packed", "W8A8")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    described = config["quantization_config"]
    described |= {"quantization_status": "frozen", "format": "naive-quantized"}
    del described["config_groups"]["group_0"]["format"]
    path.write_text(json.dumps(config))
    source = open_source(str(tmp_path / "packed"), from_="dequantize")
    assert source.note == "dequantized from compressed-tensors naive-quantized to bfloat16"
    assert torch.equal(source.read(f"{Q_PROJ}.weight"), meant[f"{Q_PROJ}.weight"].float().bfloat16())


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("preset", ["NVFP4A16", "NVFP4", "FP8_DYNAMIC", "FP8_BLOCK", "FP8"])
def test_modelopt(preset: str, inline: bool, tmp_path: Path) -> None:
    """The values meant, rounded to bfloat16 once or twice; described in either file."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    folder = tmp_path / "packed"
    meant = compress_folder(plain, folder, preset)
    algorithm = algorithm_for(preset)
    assert algorithm is not None

    def respell(stored: Tensors) -> None:
        for module in (name.removesuffix(".weight") for name in meant):
            names = [name for name in stored if name.startswith(f"{module}.")]
            local = {name.removeprefix(f"{module}."): stored.pop(name) for name in names}
            spelled = to_modelopt(algorithm, local)
            stored |= {f"{module}.{name}": tensor.contiguous() for name, tensor in spelled.items()}

    edit(folder, respell)
    config = json.loads((folder / "config.json").read_text())
    described = {"quant_algo": algorithm.name}
    if inline:
        config["quantization_config"] = described | {"quant_method": "modelopt"}
    else:
        del config["quantization_config"]
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": described}))
    (folder / "config.json").write_text(json.dumps(config))
    source = open_source(str(folder), from_="dequantize")
    assert source.note == f"dequantized from ModelOpt {algorithm.name} to bfloat16"
    assert dict(source.headers) == dict(open_source(str(plain)).headers)
    for name, weight in meant.items():
        # 2^-8 is half a bfloat16 ulp; the reciprocal of ModelOpt's second scale adds a rounding in fp32.
        torch.testing.assert_close(read(folder, name).double(), weight, rtol=2.0**-8 * 1.01, atol=0)


def test_fp8_blocks_as_transformers(tmp_path: Path) -> None:
    """DeepSeek-V3's layout, matrices and fused experts: the bits of transformers' own dequantization."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    matrix, experts = fp8(384, 256), fp8(3, 256, 128)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": matrix["weight"],
        "model.layers.0.mlp.up_proj.weight_scale_inv": matrix["weight_scale_inv"],
        "model.layers.0.mlp.experts.down_proj": experts["weight"],
        "model.layers.0.mlp.experts.down_proj_scale_inv": experts["weight_scale_inv"],
        "model.norm.weight": torch.ones(8),
    }
    folder = write(tmp_path / "m", {"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors)
    source = open_source(str(folder), from_="dequantize")
    assert list(source.headers) == [name for name in open_headers(folder) if not name.endswith("_scale_inv")]
    assert source.note == "dequantized from FP8 in blocks of 128 x 128 to bfloat16"
    theirs = Fp8Dequantize(None)
    for name, made in (
        ("model.layers.0.mlp.up_proj.weight", matrix),
        ("model.layers.0.mlp.experts.down_proj", experts),
    ):
        expected = theirs._dequantize_one(made["weight"], made["weight_scale_inv"], torch.bfloat16)
        assert torch.equal(read(folder, name), expected)
    assert torch.equal(read(folder, name, 1), expected[1])
    assert source.read("model.norm.weight").dtype == torch.float32


def open_headers(folder: Path) -> list[str]:
    """Names of the stored tensors, in file order."""
    from compressor.checkpoint.safetensors_file import read_header

    return list(read_header(folder / "model.safetensors").headers)


class _Fetched(FolderSource):
    """A folder of which each tensor is a file that was downloaded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, label="fetched", quantized=True)
        self.homes = {name: f"{name}.file" for name in self.headers}
        self.file_bytes = {f"{name}.file": header.nbytes for name, header in self.headers.items()}
        self.held_bytes = 7
        self.kept: set[str] = set()

    def keep_only(self, names: Set[str]) -> None:
        self.kept = set(names)


def test_what_is_fetched_for_a_tensor_is_known_and_let_go(tmp_path: Path) -> None:
    """The files of codes and of scales, in the plan's counting and when room is made on the disk."""
    name = "model.layers.0.mlp.up_proj.weight"
    made = fp8(256, 128)
    tensors = {name: made["weight"], f"{name}_scale_inv": made["weight_scale_inv"]}
    tensors["model.norm.weight"] = torch.ones(8)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored = _Fetched(write(tmp_path / "m", quantization, tensors))
    source = DequantizedSource(stored)
    parts = {name, f"{name}_scale_inv"}
    files = fetched_files(source)
    assert files is not None
    assert set(files.homes[name]) == {f"{part}.file" for part in parts}
    assert files.file_bytes == stored.file_bytes
    assert files.held_bytes == 7
    let_go(source, {name})
    assert stored.kept == parts
    let_go(source, {"model.norm.weight"})
    assert stored.kept == {"model.norm.weight"}
    assert fetched_files(FolderSource(tmp_path / "m", label="local", quantized=True)) is None


@pytest.mark.parametrize("chunk", [groups.CHUNK_VALUES, 1])
def test_fp8_blocks_that_end_early(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows: the last block is smaller."""
    monkeypatch.setattr(groups, "CHUNK_VALUES", chunk)
    made = fp8(192, 200)
    tensors = {f"a.{name}": tensor for name, tensor in made.items()}
    tensors |= {"a.input_scale": torch.tensor(0.5), "self_attn.k_scale": torch.tensor([1.0])}
    folder = write(tmp_path / "m", {"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors)
    factor = made["weight_scale_inv"].repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(read(folder, "a.weight"), (made["weight"].float() * factor).bfloat16())
    source = open_source(str(folder), from_="dequantize")
    assert list(source.headers) == ["a.weight"]
    assert source.note.endswith("; its KV-cache scales are left out")


class _Largest(TorchFunctionMode):
    """Notes the most values of any tensor that is made."""

    values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.values = max(self.values, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("block", [(2**20, 1), (1, 2**20), (2**20, 2**20)])
def test_fp8_blocks_larger_than_the_matrix(block: tuple[int, int], tmp_path: Path) -> None:
    """Take no more memory than the matrix."""
    codes_OI = fp8(48, 40)["weight"]
    factor = torch.rand(-(-48 // block[0]), -(-40 // block[1])) + 0.5
    described = {"quant_method": "fp8", "weight_block_size": list(block)}
    folder = write(tmp_path / "m", described, {"a.weight": codes_OI, "a.weight_scale_inv": factor})
    largest = _Largest()
    with largest:
        found = read(folder, "a.weight")
    assert largest.values == 48 * 40
    assert torch.equal(found, (codes_OI.float() * factor).bfloat16())


@pytest.mark.parametrize("chunk", [groups.CHUNK_VALUES, 1])
def test_zero_points_of_blocks(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk of rows is given those of its blocks."""
    monkeypatch.setattr(groups, "CHUNK_VALUES", chunk)
    weights = {"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [32, 16]}
    folder = write(
        tmp_path / "m",
        _one_group("int-quantized", weights | {"symmetric": False}),
        {
            "a.weight": (codes_OI := torch.randint(-128, 128, (96, 32)).to(torch.int8)),
            "a.weight_scale": (scale := torch.rand(3, 2) + 0.1),
            "a.weight_zero_point": (zero := torch.randint(-20, 20, (3, 2)).to(torch.int8)),
        },
    )
    scale_OI, zero_OI = (grid.float().kron(torch.ones(32, 16)) for grid in (scale, zero))
    assert torch.equal(read(folder, "a.weight"), ((codes_OI - zero_OI) * scale_OI).bfloat16())


def _one_group(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` in which all linear layers are stored alike."""
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}}


def test_blocks_that_would_be_padded_without_bound(tmp_path: Path) -> None:
    """The library fills the last blocks: refused from the headers."""
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [2**21, 1]}
    tensors = {"a.weight": fp8(1, 512)["weight"], "a.weight_scale": torch.ones(1, 512)}
    folder = write(tmp_path / "m", _one_group("float-quantized", weights), tensors)
    with pytest.raises(CheckpointError, match="blocks of 2,097,152 x 1 in a matrix of 1 x 512"):
        open_source(str(folder), from_="dequantize")


def test_fp8_of_one_factor(tmp_path: Path) -> None:
    """Without blocks there is one factor for the matrix."""
    codes = fp8(16, 8)["weight"]
    tensors = {
        "a.weight": codes,
        "a.weight_scale_inv": torch.tensor(0.25),
        "a.activation_scale": torch.tensor(1.0),
    }
    folder = write(tmp_path / "m", {"quant_method": "fp8", "activation_scheme": "static"}, tensors)
    assert torch.equal(read(folder, "a.weight"), (codes.float() * 0.25).bfloat16())


def test_mxfp4_as_transformers(tmp_path: Path) -> None:
    """gpt-oss's experts: the bits of transformers' own conversion, all of them or one; biases as they lie."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 24, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 24, 2), dtype=torch.uint8, generator=generator)
    bias = torch.randn(3, 24, generator=generator).bfloat16()
    at = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{at}_blocks": blocks, f"{at}_scales": scales, f"{at}_bias": bias}
    folder = write(tmp_path / "m", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, tensors)
    source = open_source(str(folder), from_="dequantize")
    assert source.headers[at].shape == (3, 64, 24)
    assert source.note == "dequantized from MXFP4 to bfloat16"
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(read(folder, at), expected)
    assert torch.equal(read(folder, at, 2), expected[2])
    assert torch.equal(source.read(f"{at}_bias"), bias)


def test_fingerprint(tmp_path: Path) -> None:
    """It tells the source from the same bytes read otherwise, and follows their changes."""
    folder = tmp_path / "m"
    write(
        folder,
        {"quant_method": "fp8"},
        {"a.weight": fp8(16, 8)["weight"], "a.weight_scale_inv": torch.ones(())},
    )
    first = open_source(str(folder), from_="dequantize").fingerprint
    assert first == open_source(str(folder), from_="dequantize").fingerprint
    edit(folder, lambda stored: stored.update({"a.weight_scale_inv": torch.tensor(2.0)}))
    assert first != open_source(str(folder), from_="dequantize").fingerprint
