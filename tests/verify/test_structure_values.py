"""Values, KV scales and side files of a checkpoint, one wrong at a time; and folders that mean harm."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import CheckpointError
from compressor.model.families.naming import fuse_group
from compressor.model.load import load_checkpoint_model
from compressor.progress import Silent
from compressor.verify.structure import check_structure
from tests.model.compressed import compress_folder
from tests.tiny import tiny_llama4

from .checked import failed, statuses
from .corrupt import Tensors, edit_config, read_tensors, rewrite
from .made import modelopt

# ---- shapes and values


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def _put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with its first element replaced."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


UP, DOWN, Q = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
# preset or ModelOpt algorithm, tensor, what happens to it, check, words of its detail
VALUES: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor], str, str]] = [
    (
        "NVFP4A16",
        f"{DOWN}.weight_packed",
        lambda t: t[:, :-8],
        "shapes",
        "U8 [128, 120] instead of U8 [128, 128]",
    ),
    ("NVFP4A16", f"{DOWN}.weight_scale", lambda t: t.float(), "shapes", "instead of F8_E4M3 [128, 16]"),
    ("NVFP4A16", f"{DOWN}.weight_global_scale", lambda t: t.repeat(2), "shapes", "F32 [2] instead of F32 []"),
    ("W4A16", f"{DOWN}.weight_packed", lambda t: t.T, "shapes", "I32 [32, 128] instead of I32 [128, 32]"),
    (
        "W4A16_ASYM",
        f"{DOWN}.weight_zero_point",
        lambda t: t[:-1],
        "shapes",
        "I32 [15, 8] instead of I32 [16, 8]",
    ),
    ("FP8_BLOCK", f"{DOWN}.weight_scale", lambda t: t.T, "shapes", "F32 [2, 1] instead of"),
    ("W8A8", f"{DOWN}.weight", lambda t: t.view(torch.uint8), "shapes", "U8 [128, 256] instead of I8"),
    ("FP8", f"{DOWN}.weight_scale", lambda t: t.repeat(128), "shapes", "F32 [128] instead of"),
    ("NVFP4", f"{DOWN}.weight_scale_2", lambda t: t.half(), "shapes", "F16 [] instead of F32 []"),
    ("FP8_DYNAMIC", "model.norm.weight", lambda t: t[:-1], "shapes", "[127] instead of [128]"),
    ("NVFP4A16", f"{DOWN}.weight_scale", _put(-1.0), "scales", "negative scales"),
    ("NVFP4A16", f"{DOWN}.weight_scale", _put(0.0), "scales", "scales of zero for weights that are not"),
    ("NVFP4A16", f"{DOWN}.weight_global_scale", _put(torch.inf), "scales", "not finite"),
    ("NVFP4A16", f"{DOWN}.weight_global_scale", _put(0.0), "scales", "not positive"),
    ("NVFP4A16", f"{DOWN}.weight_global_scale", _put(4e31), "scales", "which no model has"),
    ("NVFP4A16", f"{DOWN}.weight_global_scale", _put(1e-43), "scales", "which no model has"),
    ("NVFP4A16", f"{Q}.weight_global_scale", _put(30.0), "scales", "engines fuse them"),
    ("NVFP4", f"{Q}.input_scale", _put(0.01), "scales", "engines fuse them"),
    ("FP8", f"{Q}.input_scale", _put(0.02), "scales", "engines fuse them"),
    ("NVFP4", f"{UP}.weight_scale_2", _put(0.03), "scales", "weight_scale_2 differs"),
    ("NVFP4", f"{DOWN}.input_scale", _put(-3e5), "scales", "not positive"),
    ("MXFP4A16", f"{DOWN}.weight_scale", _put(200), "scales", "which no model has"),
    ("W4A16", f"{DOWN}.weight_scale", _put(torch.nan), "scales", "NaN or infinity"),
    ("W4A16", f"{DOWN}.weight_scale", _put(0.0), "scales", "scales of zero"),
    ("W4A16", f"{DOWN}.weight_shape", _put(64), "scales", "says [64, 256] of a matrix of [128, 256]"),
    ("W8A8", f"{DOWN}.weight_scale", _put(0.0), "scales", "scales of zero"),
    ("FP8_DYNAMIC", f"{DOWN}.weight", _put(torch.nan), "scales", "the FP8 code 0x7F or 0xFF"),
    ("FP8_BLOCK", f"{DOWN}.weight_scale", _put(1e9), "scales", "which no model has"),
    ("FP8", f"{DOWN}.weight", _put(torch.nan), "scales", "the FP8 code 0x7F or 0xFF"),
    ("FP8", f"{DOWN}.weight_scale", _put(0.0), "scales", "not positive"),
    ("FP8", f"{DOWN}.input_scale", _put(torch.nan), "scales", "not finite"),
]


def _named(value: object) -> str:
    """Words as they are; a function without its address, which differs between processes that share tests."""
    return value if isinstance(value, str) else "change"


@pytest.mark.parametrize(("preset", "name", "change", "check", "words"), VALUES, ids=_named)
def test_wrong_shapes_and_values(
    preset: str,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    check: str,
    words: str,
    dense: Path,
    tmp_path: Path,
) -> None:
    """One tensor of one matrix is wrong: that check alone names it."""
    folder = tmp_path / "model"
    if preset in ("NVFP4", "FP8"):
        modelopt(dense, folder, preset)
    else:
        compress_folder(dense, folder, preset)
    assert failed(folder) == {}
    rewrite(folder, _set(name, change))
    found = failed(folder)
    assert found.keys() - {"config"} == {check}
    assert words in found[check]
    assert name.rpartition(".")[0] in found[check]


@pytest.mark.parametrize("preset", ["NVFP4A16", "W4A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_zero_scales_of_empty_blocks_are_legal(preset: str, dense: Path, tmp_path: Path) -> None:
    """A block of zeros loses nothing by a scale of zero, wherever it lies."""
    folder = tmp_path / "model"
    compress_folder(dense, folder, preset)
    codes = f"{DOWN}.weight_packed" if preset in ("NVFP4A16", "W4A16") else f"{DOWN}.weight"
    # Packed INT4 stores zero as 8.
    zero = -2004318072 if preset == "W4A16" else 0

    def emptied(tensors: Tensors) -> Tensors:
        scale, code = tensors[f"{DOWN}.weight_scale"].clone(), tensors[codes].clone()
        scale[-1, -1] = 0
        code[-1:, -code.shape[1] // scale.shape[1] :] = zero
        if preset == "FP8_BLOCK":
            code[:, 128:] = zero
        return tensors | {f"{DOWN}.weight_scale": scale, codes: code}

    rewrite(folder, emptied)
    assert failed(folder) == {}
    rewrite(folder, _set(codes, lambda code: _put_last(code, 1)))
    assert "scales of zero for weights that are not" in failed(folder)["scales"]


def _put_last(tensor: torch.Tensor, value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def test_fused_neighbours_of_every_kind(tmp_path: Path) -> None:
    """Gate and up of one expert share a scale; two experts do not."""
    import compressor
    from tests.e2e.cases import write_recipe

    recipe = write_recipe(tmp_path / "r.yaml", tiny_llama4(tmp_path / "source"), "{scheme: nvfp4a16}")
    folder = compressor.run(recipe, output=tmp_path / "out").output
    tensors = read_tensors(folder)
    scales = {name: float(t) for name, t in tensors.items() if name.endswith("weight_global_scale")}
    groups: dict[str, set[float]] = {}
    for name, value in scales.items():
        module = name.removesuffix(".weight_global_scale")
        groups.setdefault(fuse_group(module) or module, set()).add(value)
    assert all(len(values) == 1 for values in groups.values())
    assert len(set(scales.values())) > 1
    victim = "model.layers.1.feed_forward.experts.2.up_proj"
    rewrite(folder, _set(f"{victim}.weight_global_scale", lambda t: t * 2))
    detail = failed(folder)["scales"]
    assert victim in detail
    assert "experts.2.gate_proj" in detail
    assert "experts.1." not in detail


# ---- KV cache


def _kv(folder: Path, scheme: dict[str, Any] | None = None) -> None:
    """A config that asks for an FP8 cache and leaves the weights alone."""
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    entry = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    entry["kv_cache_scheme"] = cache | (scheme or {})
    edit_config(folder, lambda config: config.update(quantization_config=entry))


KV_NAMES = [
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale"),
    ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    ("self_attn.kv_scale", "self_attn.kv_scale"),
]


@pytest.mark.parametrize("names", KV_NAMES, ids=lambda names: str(names[0]))
def test_kv_scales_by_every_name(names: tuple[str, str], dense: Path, tmp_path: Path) -> None:
    """The names that vLLM maps to a layer's scales (maybe_remap_kv_scale_name)."""
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    _kv(folder)
    scales = {f"model.layers.{layer}.{name}": torch.ones(1) for layer in range(2) for name in names}
    rewrite(folder, lambda tensors: tensors | scales)
    assert failed(folder) == {}
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != f"model.layers.1.{names[1]}"})
    assert "model.layers.1.self_attn.v_scale: missing" in failed(folder)["kv_cache"]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.tensor([0.0]), "not positive"),
        (torch.tensor([torch.nan]), "not finite"),
        (torch.tensor([4e31]), "stands for values up to 1.79e+34, which no model has"),
        (torch.tensor([1, 1]), "stored as I64"),
        (torch.ones(2), "[2] instead of [1]"),
    ],
)
def test_kv_scales_are_sane(scale: torch.Tensor, words: str, dense: Path, tmp_path: Path) -> None:
    """Values, dtype and shape of one scale."""
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    _kv(folder)
    names = [f"model.layers.{layer}.self_attn.{side}_scale" for layer in range(2) for side in "kv"]
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(1) for name in names} | {names[2]: scale})
    assert failed(folder).keys() == {"kv_cache"}
    assert f"{names[2]}: {words}" in failed(folder)["kv_cache"]


def test_kv_scales_by_head_and_none_at_all(dense: Path, tmp_path: Path) -> None:
    """One scale a head has the heads' shape; a dynamic cache has none; no scales at all are a fault."""
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    _kv(folder)
    assert failed(folder)["kv_cache"].startswith("model.layers.0.self_attn.k_scale")
    _kv(folder, {"dynamic": True})
    assert failed(folder) == {}
    _kv(folder, {"strategy": "attn_head"})
    names = [f"model.layers.{layer}.self_attn.{side}_scale" for layer in range(2) for side in "kv"]
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(2, 1, 1) for name in names})
    assert failed(folder) == {}
    rewrite(folder, lambda tensors: tensors | {names[0]: torch.ones(1)})
    assert "[1] instead of [2, 1, 1]" in failed(folder)["kv_cache"]


@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba"])
def test_kv_scales_of_hybrids(model_type: str, tmp_path: Path) -> None:
    """Only layers with attention have a KV cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 4, "vocab_size": 256, "num_experts": 2, "moe_intermediate_size": 32}
    own = {"attn_layer_period": 4, "attn_layer_offset": 3} if model_type == "jamba" else {}
    folder = tmp_path / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(model_type, **sizes, **own)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    _kv(folder)
    detail = failed(folder)["kv_cache"]
    assert detail.startswith("model.layers.3.self_attn.k_scale, model.layers.3.self_attn.v_scale: missing")
    scales = {f"model.layers.3.self_attn.{side}_scale": torch.ones(1) for side in "kv"}
    rewrite(folder, lambda tensors: tensors | scales)
    assert failed(folder) == {}


# ---- side files and hostile folders


def test_tokenizer_and_manifest(dense: Path, tmp_path: Path) -> None:
    """No tokenizer is a reason to skip; a broken one, or another file than was exported, is a fault."""
    import compressor
    from tests.e2e.cases import write_recipe

    recipe = write_recipe(tmp_path / "r.yaml", dense, "{scheme: int8}")
    folder = compressor.run(recipe, output=tmp_path / "out").output
    assert set(statuses(folder).values()) == {"passed"}
    (folder / "tokenizer.json").write_text("{")
    (folder / "generation_config.json").write_text("[]")
    found = failed(folder)
    assert found.keys() == {"tokenizer", "manifest"}
    assert "tokenizer.json is not valid JSON" in found["tokenizer"]
    assert "generation_config.json is not a JSON object" in found["tokenizer"]
    assert "generation_config.json: 2 bytes instead of" in found["manifest"]
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").unlink()
    (folder / "manifest.json").unlink()
    assert {n: s for n, s in statuses(folder).items() if s != "passed"} == {
        "tokenizer": "skipped",
        "manifest": "skipped",
    }
    (folder / "manifest.json").write_text("{}")
    assert "not a manifest" in failed(folder)["manifest"]


def test_costly_configs_end_soon(dense: Path, tmp_path: Path) -> None:
    """Patterns that backtrack, layers without end, and too many patterns are refused, not tried."""
    began = time.monotonic()
    folder = tmp_path / "model"
    compress_folder(dense, folder, "W4A16")
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    for ignore, words in (
        (["re:(.*)*x$"], "exponential"),
        (["re:" + "a" * 600], "at most 512"),
        ([f"re:{number}" for number in range(2_001)], "more than 2,000"),
    ):
        edit_config(folder, lambda config, ignore=ignore: config["quantization_config"].update(ignore=ignore))
        assert words in failed(folder)["config"]
    edit_config(folder, lambda config: config.update(quantization_config=entry, num_hidden_layers=10**9))
    found = {check.name: check for check in check_structure(folder, Silent())}
    assert "num_hidden_layers 1,000,000,000 is more than" in found["tensors"].detail
    edit_config(folder, lambda config: config.update(num_hidden_layers=2, hidden_size="wide"))
    found = {check.name: check for check in check_structure(folder, Silent())}
    assert "transformers cannot build the model" in found["tensors"].detail
    # Seconds for ten passes over a folder of 1 MB: none of them may hang.
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_chooses_no_code(key: str, dense: Path, tmp_path: Path) -> None:
    """Kernels that transformers would fetch from the Hub for a config's sake: the model is built without."""
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    edit_config(
        folder, lambda config: config.update({key: "someone/kernels", "auto_map": {"AutoConfig": "x.Y"}})
    )
    assert set(failed(folder)) == {"config"}
    assert "those of LlamaForCausalLM" in check_structure(folder, Silent())[2].detail


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "paged|someone/kernel@main:f"},
        {"experts_implementation": "someone/kernel"},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
    ],
    ids=["attention", "paged", "experts", "nested", "by part"],
)
def test_kernels_from_the_hub_are_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """transformers would fetch and run them: said by the check, and by whoever loads the folder."""
    from transformers import modeling_utils

    asked: list[object] = []
    monkeypatch.setattr(
        modeling_utils, "lazy_import_flash_attention", lambda *given, **how: asked.append(given)
    )
    copy = tmp_path / "copy"
    shutil.copytree(dense, copy)
    edit_config(copy, lambda config: config.update(change))
    assert "code from the Hub" in failed(copy)["config"]
    with pytest.raises(CheckpointError, match="code from the Hub is never run"):
        load_checkpoint_model(copy, torch.float32)
    assert asked == []
    edit_config(copy, lambda config: [config.pop(key) for key in change])
    edit_config(copy, lambda config: config.update(attn_implementation="eager"))
    assert "config" not in failed(copy)
    load_checkpoint_model(copy, torch.float32)
