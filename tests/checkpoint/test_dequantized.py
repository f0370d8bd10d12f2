"""Quantized sources read as bfloat16: every format against the library that defines it; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from compressor.checkpoint.base import fetched_files, let_go
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.modelopt import algorithm_for, to_modelopt
from compressor.checkpoint.shipped import ShippedHeaders
from compressor.checkpoint.sources import open_source
from compressor.errors import CheckpointError
from compressor.numerics import groups
from tests.model.compressed import FORMATS, compress_folder
from tests.tiny import tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"
# W8A16 is a preset of groups, but made by hand with a scale for each row.
PRESETS = [preset for preset in FORMATS if preset != "W8A16"]
Tensors = dict[str, torch.Tensor]


def _write(folder: Path, quantization: dict[str, Any] | None, tensors: Tensors) -> Path:
    """A folder that only a source opens."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors of a folder in place."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _read(folder: Path, name: str, index: int | None = None) -> torch.Tensor:
    """The tensor of the opened folder, of the dtype and shape that its header promises."""
    source = open_source(str(folder), from_="dequantize")
    found = source.read(name, index)
    header = source.headers[name]
    assert header.dtype == "BF16"
    assert found.dtype == torch.bfloat16
    assert tuple(found.shape) == (header.shape if index is None else header.shape[1:])
    return found


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
            assert torch.equal(_read(folder, name), _library(local, folder).bfloat16()), name
            row = _read(folder, name, 3)
            assert torch.equal(row, _read(folder, name)[3])
        else:
            assert torch.equal(source.read(name), stored[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    """Code x scale is exact in fp32 and rounded to bfloat16 once, whatever the scales are stored in."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", "FP8_DYNAMIC")

    def narrow(stored: Tensors) -> None:
        stored[f"{Q_PROJ}.weight_scale"] = stored[f"{Q_PROJ}.weight_scale"].to(dtype)

    _edit(tmp_path / "packed", narrow)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    exact = stored[f"{Q_PROJ}.weight"].double() * stored[f"{Q_PROJ}.weight_scale"].double()
    assert torch.equal(_read(tmp_path / "packed", f"{Q_PROJ}.weight"), exact.float().bfloat16())


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
    _edit(tmp_path / "packed", lambda stored: stored.update({name: stored[name].reshape(shape)}))
    found = _read(tmp_path / "packed", f"{Q_PROJ}.weight")
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

    _edit(folder, respell)
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
        torch.testing.assert_close(_read(folder, name).double(), weight, rtol=2.0**-8 * 1.01, atol=0)


def _fp8(*shape: int, block: int = 128) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    scale_shape = (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block))
    return {
        "weight": (torch.randn(shape, generator=generator) * 60).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(scale_shape, generator=generator) * 0.002 + 0.001,
    }


def test_fp8_blocks_as_transformers(tmp_path: Path) -> None:
    """DeepSeek-V3's layout, matrices and fused experts: the bits of transformers' own dequantization."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    matrix, experts = _fp8(384, 256), _fp8(3, 256, 128)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": matrix["weight"],
        "model.layers.0.mlp.up_proj.weight_scale_inv": matrix["weight_scale_inv"],
        "model.layers.0.mlp.experts.down_proj": experts["weight"],
        "model.layers.0.mlp.experts.down_proj_scale_inv": experts["weight_scale_inv"],
        "model.norm.weight": torch.ones(8),
    }
    folder = _write(tmp_path / "m", {"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors)
    source = open_source(str(folder), from_="dequantize")
    assert list(source.headers) == [name for name in open_headers(folder) if not name.endswith("_scale_inv")]
    assert source.note == "dequantized from FP8 in blocks of 128 x 128 to bfloat16"
    theirs = Fp8Dequantize(None)
    for name, made in (
        ("model.layers.0.mlp.up_proj.weight", matrix),
        ("model.layers.0.mlp.experts.down_proj", experts),
    ):
        expected = theirs._dequantize_one(made["weight"], made["weight_scale_inv"], torch.bfloat16)
        assert torch.equal(_read(folder, name), expected)
    assert torch.equal(_read(folder, name, 1), expected[1])
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
    made = _fp8(256, 128)
    tensors = {name: made["weight"], f"{name}_scale_inv": made["weight_scale_inv"]}
    tensors["model.norm.weight"] = torch.ones(8)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored = _Fetched(_write(tmp_path / "m", quantization, tensors))
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
    made = _fp8(192, 200)
    tensors = {f"a.{name}": tensor for name, tensor in made.items()}
    tensors |= {"a.input_scale": torch.tensor(0.5), "self_attn.k_scale": torch.tensor([1.0])}
    folder = _write(tmp_path / "m", {"quant_method": "fp8", "weight_block_size": [128, 128]}, tensors)
    factor = made["weight_scale_inv"].repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(_read(folder, "a.weight"), (made["weight"].float() * factor).bfloat16())
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
    codes_OI = _fp8(48, 40)["weight"]
    factor = torch.rand(-(-48 // block[0]), -(-40 // block[1])) + 0.5
    described = {"quant_method": "fp8", "weight_block_size": list(block)}
    folder = _write(tmp_path / "m", described, {"a.weight": codes_OI, "a.weight_scale_inv": factor})
    largest = _Largest()
    with largest:
        found = _read(folder, "a.weight")
    assert largest.values == 48 * 40
    assert torch.equal(found, (codes_OI.float() * factor).bfloat16())


@pytest.mark.parametrize("chunk", [groups.CHUNK_VALUES, 1])
def test_zero_points_of_blocks(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk of rows is given those of its blocks."""
    monkeypatch.setattr(groups, "CHUNK_VALUES", chunk)
    weights = {"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [32, 16]}
    folder = _write(
        tmp_path / "m",
        _one_group("int-quantized", weights | {"symmetric": False}),
        {
            "a.weight": (codes_OI := torch.randint(-128, 128, (96, 32)).to(torch.int8)),
            "a.weight_scale": (scale := torch.rand(3, 2) + 0.1),
            "a.weight_zero_point": (zero := torch.randint(-20, 20, (3, 2)).to(torch.int8)),
        },
    )
    scale_OI, zero_OI = (grid.float().kron(torch.ones(32, 16)) for grid in (scale, zero))
    assert torch.equal(_read(folder, "a.weight"), ((codes_OI - zero_OI) * scale_OI).bfloat16())


def _one_group(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` in which all linear layers are stored alike."""
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}}


def test_blocks_that_would_be_padded_without_bound(tmp_path: Path) -> None:
    """The library fills the last blocks: refused from the headers."""
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [2**21, 1]}
    tensors = {"a.weight": _fp8(1, 512)["weight"], "a.weight_scale": torch.ones(1, 512)}
    folder = _write(tmp_path / "m", _one_group("float-quantized", weights), tensors)
    with pytest.raises(CheckpointError, match="blocks of 2,097,152 x 1 in a matrix of 1 x 512"):
        open_source(str(folder), from_="dequantize")


def test_fp8_of_one_factor(tmp_path: Path) -> None:
    """Without blocks there is one factor for the matrix."""
    codes = _fp8(16, 8)["weight"]
    tensors = {
        "a.weight": codes,
        "a.weight_scale_inv": torch.tensor(0.25),
        "a.activation_scale": torch.tensor(1.0),
    }
    folder = _write(tmp_path / "m", {"quant_method": "fp8", "activation_scheme": "static"}, tensors)
    assert torch.equal(_read(folder, "a.weight"), (codes.float() * 0.25).bfloat16())


def test_mxfp4_as_transformers(tmp_path: Path) -> None:
    """gpt-oss's experts: the bits of transformers' own conversion, all of them or one; biases as they lie."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 24, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 24, 2), dtype=torch.uint8, generator=generator)
    bias = torch.randn(3, 24, generator=generator).bfloat16()
    at = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{at}_blocks": blocks, f"{at}_scales": scales, f"{at}_bias": bias}
    folder = _write(tmp_path / "m", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, tensors)
    source = open_source(str(folder), from_="dequantize")
    assert source.headers[at].shape == (3, 64, 24)
    assert source.note == "dequantized from MXFP4 to bfloat16"
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(_read(folder, at), expected)
    assert torch.equal(_read(folder, at, 2), expected[2])
    assert torch.equal(source.read(f"{at}_bias"), bias)


def test_fingerprint(tmp_path: Path) -> None:
    """It tells the source from the same bytes read otherwise, and follows their changes."""
    folder = tmp_path / "m"
    _write(
        folder,
        {"quant_method": "fp8"},
        {"a.weight": _fp8(16, 8)["weight"], "a.weight_scale_inv": torch.ones(())},
    )
    first = open_source(str(folder), from_="dequantize").fingerprint
    assert first == open_source(str(folder), from_="dequantize").fingerprint
    _edit(folder, lambda stored: stored.update({"a.weight_scale_inv": torch.tensor(2.0)}))
    assert first != open_source(str(folder), from_="dequantize").fingerprint


CT: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {}}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
F8 = _fp8(128, 128)


@pytest.mark.parametrize(
    "quantization, tensors, message",
    [
        (None, {"a.weight": torch.ones(2)}, "config.json has no quantization_config"),
        ({"quant_method": "gptq"}, {"a.qweight": torch.ones(2)}, "quantized with 'gptq'; fp8, mxfp4"),
        ({"bits": 4}, {"a.qweight": torch.ones(2)}, "quantized with ''"),
        (BLOCKS, {"a.weight": F8["weight"]}, "tensor a.weight_scale_inv is missing"),
        (BLOCKS, {"a.weight_scale_inv": torch.ones(1, 1)}, "a.weight_scale_inv scales no tensor"),
        (
            BLOCKS,
            {"a.weight": F8["weight"], "a.weight_scale_inv": torch.ones(2, 1)},
            r"a.weight_scale_inv is F32 \[2, 1\], where F32 or BF16 or F16 \[1, 1\] belongs",
        ),
        (
            BLOCKS,
            {"a.weight": F8["weight"], "a.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)},
            r"a.weight_scale_inv is I32 \[1, 1\]",
        ),
        (
            BLOCKS,
            {"a.weight": F8["weight"], "a.weight_scale_inv": torch.ones(1, 1), "b": torch.ones(2).byte()},
            "tensor b is U8, and FP8 in blocks of 128 x 128 does not say how it is quantized",
        ),
        (BLOCKS | {"fmt": "e5m2"}, F8, "FP8 format 'e5m2'"),
        (BLOCKS | {"weight_block_size": [0, 128]}, F8, r"weight_block_size is \[0, 128\]"),
        (BLOCKS | {"weight_block_size": 128}, F8, "weight_block_size is 128"),
        ({"quant_method": "mxfp4"}, {"a": torch.ones(2)}, "no tensor is called \\*_blocks"),
        (
            {"quant_method": "mxfp4"},
            {"a_blocks": torch.ones(1, 2, 3, 8).byte(), "a_scales": torch.ones(1, 2, 3).byte()},
            r"shape \[1, 2, 3, 8\], not \[experts, out, in / 32, 16\]",
        ),
        ({"quant_method": "mxfp4"}, {"a_blocks": torch.ones(1, 2, 3, 16).byte()}, "a_scales is missing"),
        (CT, {"a.weight": torch.ones(2)}, "no tensor is called \\*.weight_scale"),
        (CT, {"a.weight": torch.ones(2), "a.weight_scale": torch.ones(2)}, "no group of quantization_config"),
        (CT | {"transform_config": {"x": 1}}, {"a.weight": torch.ones(2)}, "rotated"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {"a.weight": torch.ones(2)}, "sparse"),
        (CT, {"experts.w_weight_scale": torch.ones(2)}, "experts quantized in one tensor"),
    ],
)
def test_refused_when_it_is_opened(
    quantization: dict[str, Any] | None, tensors: Tensors, message: str, tmp_path: Path
) -> None:
    """One message that names the tensor or the format."""
    folder = _write(tmp_path / "m", quantization, {name: tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        open_source(str(folder), from_="dequantize")


@pytest.mark.parametrize("preset", ["W4A16", "FP8_BLOCK", "NVFP4"])
@pytest.mark.parametrize(
    "path, value",
    [
        (("config_groups", "group_0", "weights", "num_bits"), 0),
        (("config_groups", "group_0", "weights", "num_bits"), -4),
        (("config_groups", "group_0", "weights", "num_bits"), 10**9),
        (("config_groups", "group_0", "weights", "group_size"), "128"),
        (("config_groups", "group_0", "weights", "group_size"), [128]),
        (("config_groups", "group_0", "weights", "scale_dtype"), 5),
        (("config_groups", "group_0", "targets"), ["re:("]),
        (("config_groups", "group_0"), None),
        (("config_groups", "group_0"), []),
        (("config_groups",), {"zz": ["Linear"]}),
        (("config_groups",), 5),
        (("ignore",), ["re:("]),
        (("ignore",), [5]),
        (("kv_cache_scheme",), 5),
    ],
)
def test_spoilt_descriptions(preset: str, path: tuple[str, ...], value: object, tmp_path: Path) -> None:
    """Whatever the library makes of them, they are faults of the checkpoint."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", preset)
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    inner = config["quantization_config"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        open_source(str(tmp_path / "packed"), from_="dequantize")


def _drop(leaf: str) -> Callable[[Tensors], Any]:
    return lambda stored: stored.pop(f"{Q_PROJ}.{leaf}")


def _put(leaf: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda stored: stored.update({f"{Q_PROJ}.{leaf}": tensor})


@pytest.mark.parametrize(
    "preset, spoil, message",
    [
        ("W4A16", _drop("weight_scale"), "weight_scale is missing"),
        ("W4A16", _drop("weight_packed"), "q_proj.weight_packed is missing"),
        ("W4A16", _drop("weight_shape"), "q_proj.weight_shape is missing"),
        ("W4A16", _put("weight_shape", torch.tensor([128])), r"weight_shape is I64 \[1\]"),
        ("W4A16", _put("weight_scale", torch.ones(128, 3)), r"weight_scale is F32 \[128, 3\]"),
        ("W4A16", _put("weight_g_idx", torch.ones(128)), "weight_g_idx belongs to a quantized module"),
        ("W4A16", _put("weight", torch.ones(128, 128)), "q_proj.weight belongs to a quantized module"),
        ("W4A16", _put("weight_packed", torch.ones(128).int()), r"weight_packed is I32 \[128\]"),
        (
            "W4A16_ASYM",
            _put("weight_zero_point", torch.ones(1, 4).int()),
            r"weight_zero_point is I32 \[1, 4\]",
        ),
        ("NVFP4", _put("weight_global_scale", torch.ones(2)), r"weight_global_scale is F32 \[2\]"),
        ("NVFP4", _put("input_global_scale", torch.ones(2)), r"input_global_scale is F32 \[2\]"),
        ("NVFP4", _drop("input_global_scale"), "input_global_scale is missing"),
        (
            "NVFP4A16",
            _put("weight_scale", torch.ones(128, 8)),
            r"weight_scale is F32 \[128, 8\], where F8_E4M3",
        ),
        ("FP8_BLOCK", _put("weight_scale", torch.ones(1, 2)), r"weight_scale is F32 \[1, 2\]"),
        ("W8A8", _put("weight", torch.ones(128, 128)), r"q_proj.weight is F32 \[128, 128\], where I8"),
    ],
)
def test_spoilt_modules(preset: str, spoil: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    """Headers that do not fit the scheme are faults before anything is read."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", preset)
    _edit(tmp_path / "packed", spoil)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path / "packed"), from_="dequantize")


@pytest.mark.parametrize(
    "preset, leaf, value, message",
    [
        ("FP8_DYNAMIC", "weight_scale", float("nan"), "q_proj.weight_scale has values that are not finite"),
        ("NVFP4", "input_global_scale", float("inf"), "input_global_scale has values that are not finite"),
        ("NVFP4A16", "weight_scale", float("nan"), "weight_scale has values that are not finite"),
        ("MXFP4A16", "weight_scale", 255, "weight_scale has values that are not finite"),
        ("FP8_DYNAMIC", "weight", float("nan"), "non-finite values .* once it is dequantized"),
        ("W4A16", "weight_shape", 120, r"weight_shape is \[128, 120\], its codes are padded to \[128, 128\]"),
    ],
)
def test_spoilt_values(preset: str, leaf: str, value: float, message: str, tmp_path: Path) -> None:
    """What headers cannot tell is refused when the tensor is read."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", preset)

    def spoil(stored: Tensors) -> None:
        tensor = stored[f"{Q_PROJ}.{leaf}"]
        flat = tensor.float() if tensor.is_floating_point() else tensor.clone()
        flat.view(-1)[-1] = value
        stored[f"{Q_PROJ}.{leaf}"] = flat.to(tensor.dtype)

    _edit(tmp_path / "packed", spoil)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path / "packed"), from_="dequantize").read(f"{Q_PROJ}.weight")


def test_hostile_mxfp4_scale(tmp_path: Path) -> None:
    """Code 255 of E8M0 is NaN."""
    tensors = {"a_blocks": torch.ones(1, 2, 1, 16).byte(), "a_scales": torch.full((1, 2, 1), 255).byte()}
    folder = _write(tmp_path / "m", {"quant_method": "mxfp4"}, tensors)
    with pytest.raises(CheckpointError, match="a_scales has values that are not finite"):
        open_source(str(folder), from_="dequantize").read("a", 0)


def test_planned_from_shipped_headers(tmp_path: Path) -> None:
    """Headers of a quantized checkpoint are enough for a plan; nothing can be read."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": BLOCKS}))
    rows = [["a.weight", "F8_E4M3", [256, 128]], ["a.weight_scale_inv", "F32", [2, 1]]]
    (tmp_path / "tensors.json").write_text(json.dumps({"source": "org/name", "tensors": rows}))
    source = DequantizedSource(ShippedHeaders(tmp_path, quantized=True))
    assert source.kind == "headers"
    assert [(header.dtype, header.shape) for header in source.headers.values()] == [("BF16", (256, 128))]
    assert source.note.startswith("planned from shipped headers; dequantized from FP8")
    with pytest.raises(CheckpointError, match="no weights here"):
        source.read("a.weight")


def test_without_being_asked_it_is_refused(tmp_path: Path) -> None:
    """The message names both ways to ask."""
    folder = _write(tmp_path / "m", BLOCKS, {f"a.{name}": tensor for name, tensor in F8.items()})
    with pytest.raises(
        CheckpointError, match=r"(?s)already quantized.*model.from: dequantize.*--from dequantize"
    ):
        open_source(str(folder))
