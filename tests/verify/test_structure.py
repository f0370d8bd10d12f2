"""Structure checks: every good checkpoint passes, and every broken one is told by the check that is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import CheckpointError
from compressor.progress import Silent
from compressor.verify.base import Check
from compressor.verify.structure import check_structure

from .corrupt import KINDS, corrupt, edit_config, read_tensors, rewrite
from .zoo import GOOD, zoo

NAMES = ["files", "config", "tensors", "shapes", "scales", "kv_cache", "tokenizer", "manifest"]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the good checkpoint of a name; whoever changes it must copy it first."""
    return zoo(tmp_path_factory.mktemp("structure"))


def checks(folder: Path) -> dict[str, Check]:
    """The checks of a folder by name, which all have to be there."""
    found = check_structure(folder, Silent())
    assert [check.name for check in found] == NAMES
    return {check.name: check for check in found}


def failed(folder: Path) -> dict[str, str]:
    """The details of the checks that failed."""
    return {check.name: check.detail for check in checks(folder).values() if check.status == "failed"}


@pytest.fixture
def copy(tmp_path: Path, made: Callable[[str], Path]) -> Callable[[str], Path]:
    """A copy of a checkpoint, to be broken."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(made(name), tmp_path / name))

    return copied


@pytest.mark.parametrize("name", GOOD)
def test_good_checkpoints_pass(name: str, made: Callable[[str], Path]) -> None:
    """No check fails, none of the weights is skipped, and the class that named the layers is told."""
    found = checks(made(name))
    statuses = {check.name: check.status for check in found.values() if check.status != "passed"}
    assert statuses in ({}, {"manifest": "skipped"}), [found[name].detail for name in statuses]
    assert "ForCausalLM" in found["tensors"].detail


# kind of damage, checkpoint, checks that must tell it
DAMAGE = [
    *(("drop_tensor", name, {"tensors"}) for name in ("nvfp4a16", "mxfp4", "int4", "moe_nvfp4")),
    *(("drop_tensor", name, {"tensors"}) for name in ("fp8_block", "modelopt_NVFP4", "mixed")),
    *(("drop_scale", name, {"tensors"}) for name in ("nvfp4a16", "fp8_dynamic", "int8", "int4_asym")),
    *(("drop_scale", name, {"tensors"}) for name in ("modelopt_FP8", "moe_nvfp4", "library_nvfp4")),
    *(("drop_norm", name, {"tensors"}) for name in ("dense", "int8", "shards", "modelopt_FP8_PB_WO")),
    *(("drop_k_scale", name, {"kv_cache"}) for name in ("library_fp8_kv", "library_kv_heads", "modelopt_kv")),
    *(("nan_scale", name, {"scales"}) for name in ("nvfp4a16", "mxfp4", "fp8_block", "int4", "int8_dynamic")),
    *(("nan_scale", name, {"scales"}) for name in ("modelopt_NVFP4", "modelopt_FP8", "moe_nvfp4")),
    *(
        ("ignore_quantized", name, {"tensors"})
        for name in ("nvfp4a16", "mixed", "modelopt_NVFP4", "moe_nvfp4")
    ),
    *(
        ("forget_ignored", name, {"tensors"})
        for name in ("nvfp4a16", "int4", "modelopt_FP8", "library_nvfp4")
    ),
    *(("forget_ignored", name, {"tensors"}) for name in ("moe_nvfp4", "moe_left", "moe_fused")),
    *(("remove_quantization_config", name, {"config"}) for name in ("nvfp4a16", "fp8_dynamic", "int8")),
    *(("remove_quantization_config", name, {"config"}) for name in ("modelopt_FP8", "mixed", "moe_nvfp4")),
    ("remove_quantization_config", "library_kv_heads", {"kv_cache"}),
    *(("truncate_file", name, {"files"}) for name in ("nvfp4a16", "dense", "shards")),
]


@pytest.mark.parametrize(("kind", "name", "expected"), DAMAGE, ids=lambda value: str(value))
def test_damage_is_told(kind: str, name: str, expected: set[str], copy: Callable[[str], Path]) -> None:
    """Exactly the named check fails, and its detail names a tensor, module or file."""
    folder = copy(name)
    corrupt(folder, kind)
    found = failed(folder)
    assert found.keys() == expected, found
    if kind != "remove_quantization_config":
        (detail,) = found.values()
        assert any(word in detail for word in ("model.layers.", "lm_head", ".safetensors")), detail


@pytest.mark.parametrize("kind", ["swap_nibbles", "swap_scales", "double_scale"])
def test_wrong_values_are_not_structural(kind: str, copy: Callable[[str], Path]) -> None:
    """Values that are merely wrong pass here: they can only be told from the source's."""
    folder = copy("nvfp4a16")
    before = read_tensors(folder)
    corrupt(folder, kind)
    after = read_tensors(folder)
    assert any(before[name].tolist() != after[name].tolist() for name in before)
    assert failed(folder) == {}


def test_every_kind_of_damage_is_used() -> None:
    """No helper that breaks a folder is left untested."""
    used = {kind for kind, _, _ in DAMAGE} | {"swap_nibbles", "swap_scales", "double_scale"}
    assert used == KINDS.keys()


def test_details_name_three_and_count_the_rest(copy: Callable[[str], Path]) -> None:
    """However many tensors are wrong, the sentence stays short."""
    folder = copy("int8")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("weight_scale")})
    detail = failed(folder)["tensors"]
    assert detail.count("weight_scale") == 3
    assert "and 11 more: missing, though config.json says that the module is stored as" in detail


def test_no_folder_is_the_users_fault(tmp_path: Path) -> None:
    """There is nothing to check."""
    with pytest.raises(CheckpointError, match="no such folder"):
        check_structure(tmp_path / "none", Silent())


# ---- files


def _index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    edit_config(folder, lambda content: change(content["weight_map"]), "model.safetensors.index.json")


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "absent tensor": (
        lambda folder: _index(folder, lambda index: index.update(extra="model-00001-of-00003.safetensors")),
        "extra: named by the index but in no file",
    ),
    "absent file": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "model-00002-of-00003.safetensors is missing",
    ),
    "unnamed tensor": (
        lambda folder: _index(folder, lambda index: index.pop("model.norm.weight")),
        "model.norm.weight: in a file, but the index does not name it",
    ),
    "other file": (
        lambda folder: _index(
            folder, lambda index: index.update({"model.norm.weight": "model-00001-of-00003.safetensors"})
        ),
        "model.norm.weight: not in the file that the index names",
    ),
    "duplicate": (
        lambda folder: shutil.copy(
            folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
        ),
        "lies in two files",
    ),
    "stray file": (
        lambda folder: shutil.copy(
            folder / "model-00001-of-00003.safetensors", folder / "model-00009-of-00009.safetensors"
        ),
        "model-00009-of-00009.safetensors: not named by the index",
    ),
    "outside": (
        lambda folder: _index(folder, lambda index: index.update({"model.norm.weight": "../x.safetensors"})),
        "names a file outside the folder",
    ),
    "link outside": (
        lambda folder: (
            (folder / "model-00001-of-00003.safetensors").rename(folder.parent / "moved.safetensors"),
            (folder / "model-00001-of-00003.safetensors").symlink_to(folder.parent / "moved.safetensors"),
        ),
        "is a link out of the folder",
    ),
    "header bomb": (
        lambda folder: (folder / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 64),
        "not a safetensors file",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "no safetensors weights",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_of_files(fault: str, copy: Callable[[str], Path]) -> None:
    """Index, shards and config.json; what cannot be judged any more is skipped, not called broken."""
    folder = copy("shards")
    spoil, sentence = FILE_FAULTS[fault]
    spoil(folder)
    found = checks(folder)
    assert found["files"].status == "failed"
    assert sentence in found["files"].detail
    assert {found[name].status for name in ("shapes", "scales")} <= {"passed", "skipped"}


# ---- config


def _entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: change(config["quantization_config"]))


def _weights(**values: object) -> Callable[[Path], None]:
    return _entry(lambda entry: entry["config_groups"]["group_0"]["weights"].update(values))


CONFIG_FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "unknown method": ("int4", _entry(lambda e: e.update(quant_method="magic")), "'magic': no engine knows"),
    "no method": ("int4", _entry(lambda e: e.pop("quant_method")), "without quant_method"),
    "refused field": ("int4", _weights(num_bits="four"), "config_groups.group_0"),
    "refused combination": ("int4", _weights(group_size=None), "requires group_size"),
    "unknown field": ("int4", _weights(colour="blue"), "compressed-tensors refuses"),
    "unknown format": (
        "int4",
        _entry(lambda e: (e.update(format="zip"), e["config_groups"]["group_0"].pop("format"))),
        "format 'zip' is not known",
    ),
    "no list": ("int4", _entry(lambda e: e.update(ignore="lm_head")), "compressed-tensors refuses"),
    "costly pattern": ("int4", _entry(lambda e: e["ignore"].append("re:(a+)+$")), "exponential time"),
    "group size": ("int4", _weights(group_size=64), "are groups of 32, not of 64"),
    "cache of integers": (
        "library_fp8_kv",
        _entry(lambda e: e["kv_cache_scheme"].update(type="int")),
        "engines load symmetric 8-bit floating point only",
    ),
    "cache by channel": (
        "library_fp8_kv",
        _entry(lambda e: e["kv_cache_scheme"].update(strategy="channel")),
        "strategy 'channel'",
    ),
    "no object": (
        "int4",
        lambda folder: edit_config(folder, lambda config: config.update(quantization_config=[1])),
        "is not an object",
    ),
    "modelopt algorithm": (
        "modelopt_FP8",
        lambda folder: (
            (folder / "hf_quant_config.json").unlink(),
            _entry(lambda e: e.update(quant_algo="W4A16_AWQ"))(folder),
        ),
        '"W4A16_AWQ" is not one that engines load',
    ),
    "modelopt without algorithm": ("modelopt_FP8", _entry(lambda e: e.pop("quant_algo")), "no quant_algo"),
    "modelopt contradiction": (
        "modelopt_FP8",
        _entry(lambda e: e.update(quant_algo="NVFP4")),
        'quant_algo is "NVFP4" in one and "FP8" in the other',
    ),
    "modelopt lists": ("modelopt_FP8", _entry(lambda e: e["ignore"].pop()), "modules left alone"),
    "modelopt cache": ("modelopt_kv", _entry(lambda e: e.pop("kv_cache_scheme")), "kv_cache_quant_algo"),
    "modelopt block": ("modelopt_NVFP4", _entry(lambda e: e.update(group_size=32)), "blocks of 16"),
    "two dialects": (
        "int4",
        lambda folder: (folder / "hf_quant_config.json").write_text(
            json.dumps({"quantization": {"quant_algo": "FP8"}})
        ),
        "remove the wrong one",
    ),
    "broken second file": (
        "modelopt_FP8",
        lambda folder: (folder / "hf_quant_config.json").write_text("{"),
        "hf_quant_config.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_faults_of_the_config(fault: str, copy: Callable[[str], Path]) -> None:
    """What an engine or a library would refuse, or read in two ways, in one clear sentence."""
    name, spoil, sentence = CONFIG_FAULTS[fault]
    folder = copy(name)
    spoil(folder)
    detail = failed(folder)["config"]
    assert sentence in detail
    assert "\n" not in detail


def test_modelopt_by_either_file(copy: Callable[[str], Path]) -> None:
    """Older exports have hf_quant_config.json alone, newer ones config.json alone: both are read."""
    folder = copy("modelopt_NVFP4")
    edit_config(folder, lambda config: config.pop("quantization_config"))
    assert checks(folder)["config"] == Check("config", "passed", "ModelOpt (NVFP4)")
    assert failed(folder) == {}
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    (other / "hf_quant_config.json").unlink()
    assert "no quantization_config" in failed(other)["config"]


@pytest.mark.parametrize(("algo", "needed"), [("NVFP4", True), ("FP8", True), ("W4A16_NVFP4", False)])
def test_modelopt_activation_scales(algo: str, needed: bool, copy: Callable[[str], Path]) -> None:
    """Where activations are quantized, an engine computes with garbage if their scale is missing."""
    folder = copy(f"modelopt_{algo}")
    rewrite(
        folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("up_proj.input_scale")}
    )
    assert ("up_proj.input_scale" in failed(folder).get("tensors", "")) == needed


def test_other_methods_are_skipped(copy: Callable[[str], Path]) -> None:
    """A method that others write is neither right nor wrong here."""
    folder = copy("int4")
    _entry(lambda entry: entry.update(quant_method="gptq"))(folder)
    found = checks(folder)
    assert {found[name].status for name in NAMES[1:6]} == {"skipped"}
    assert "'gptq': only compressed-tensors and ModelOpt are checked" in found["config"].detail
