"""The parts of the structure checks against the libraries that define the formats, and on hostile folders."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressor.progress import Silent
from compressor.verify.structure import check_structure
from compressor.verify.structure.compressed import CompressedTensors
from compressor.verify.structure.config import read_quant_config
from compressor.verify.structure.contents import Contents, open_contents
from compressor.verify.structure.expected import expected_tensors
from compressor.verify.structure.findings import Findings
from compressor.verify.structure.modules import known_modules
from compressor.verify.structure.tensors import check_tensors
from tests.model.compressed import compress_folder
from tests.tiny import tiny_llama4

from .checked import failed, statuses
from .corrupt import Tensors, edit_config, read_tensors, rewrite

SAFETENSORS = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
PRESETS = (
    *("W4A16", "W4A16_ASYM", "W3A16", "W8A16", "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8", "MXFP8A16"),
)


# ---- layouts and matching, against compressed-tensors


@pytest.mark.parametrize("preset", PRESETS)
def test_layouts_are_the_librarys(preset: str) -> None:
    """What compressed-tensors makes of a layer is what the layout demands: no more, no less, no other."""
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import (
        QuantizationConfig,
        initialize_module_for_quantization,
        preset_name_to_scheme,
    )

    linear = torch.nn.Linear(256, 384, bias=False)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    initialize_module_for_quantization(linear, scheme)
    for name, parameter in linear.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(1)
    compress_module(linear)
    described = QuantizationConfig(config_groups={"group_0": scheme}, quantization_status="compressed")
    layout = CompressedTensors(described.model_dump(mode="json")).layout("any", {"Linear"})
    assert layout is not None
    slots = layout.slots(384, 256)
    stored = {name: (SAFETENSORS[t.dtype], tuple(t.shape)) for name, t in linear.state_dict().items()}
    assert {name for name, slot in slots.items() if slot.required} == stored.keys()
    for name, (dtype, shape) in stored.items():
        assert dtype in slots[name].dtypes
        assert shape in slots[name].shapes


GROUPS: list[tuple[list[list[str]], list[str]]] = [
    ([["Linear"]], ["lm_head", r"re:.*router$"]),
    ([["re:.*self_attn.*"], ["Linear"]], ["re:.*k_proj", "Llama4Router"]),
    ([["model.layers.0.self_attn.q_proj", r"re:.*layers\.1\..*(up|gate)_proj$"]], []),
    ([["Embedding", "lm_head"]], []),
    ([["Llama4TextMLP"], ["Module"]], ["re:model.norm", "Embedding"]),
]


@pytest.mark.parametrize(("targets", "ignore"), GROUPS)
def test_matching_is_the_librarys(targets: list[list[str]], ignore: list[str], tmp_path: Path) -> None:
    """Which linear layers and embeddings a config means, by name, pattern and class."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.utils.match import is_match
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_llama4(tmp_path / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    groups = {
        f"group_{index}": preset_name_to_scheme("FP8_DYNAMIC", names).model_dump(mode="json")
        for index, names in enumerate(targets)
    }
    read = CompressedTensors({"config_groups": groups, "ignore": ignore, "format": "float-quantized"})
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            classes = {base.__name__ for base in type(module).__mro__}
            theirs = any(is_match(name, module, names, ignore) for names in targets)
            assert (read.layout(name, classes) is not None) == theirs, name
            seen.add(theirs)
    assert seen == {True, False} or ["Linear"] not in targets


# ---- which tensors a model needs


FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "qwen3_next": {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 32},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
    },
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "gpt_oss": {"num_local_experts": 2, "head_dim": 32},
    "phi3": {"pad_token_id": 0},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of another architecture, as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 4 if request.param == "deepseek_v3" else 2, "vocab_size": 256}
    config = AutoConfig.for_model(request.param, **(common | heads | FAMILIES[request.param]))
    folder = tmp_path_factory.mktemp("family") / request.param
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_other_families_pass(family: Path, tmp_path: Path) -> None:
    """What transformers saved is complete, plain and with its projections in FP8."""
    expected = {"tokenizer": "skipped", "manifest": "skipped"}
    assert {name: status for name, status in statuses(family).items() if status != "passed"} == expected
    folder = tmp_path / "quantized"
    compress_folder(family, folder, "FP8_DYNAMIC")
    # As exporters do: every matrix that is not quantized is named.
    left = [
        name.removesuffix(".weight")
        for name, tensor in read_tensors(folder).items()
        if tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and name.endswith(".weight")
    ]
    edit_config(folder, lambda config: config["quantization_config"].update(ignore=left))
    assert failed(folder) == {}


def _assert_all_needed(folder: Path) -> Contents:
    """Drops each tensor from the headers in turn: the check ``tensors`` must name it."""
    stored, _ = open_contents(folder)
    found = Findings("tensors")
    quant = read_quant_config(stored, found)
    assert quant is not None
    assert stored.config is not None
    expected = expected_tensors(stored.config, stored.headers)
    for dropped in stored.headers:
        rest = {name: header for name, header in stored.headers.items() if name != dropped}
        partial, found = replace(stored, headers=rest), Findings("tensors")
        check_tensors(partial, expected, known_modules(partial, expected, quant), quant, found)
        assert dropped in found.result("").detail
    return stored


@pytest.mark.parametrize("preset", ["NVFP4A16", "W4A16_ASYM", "FP8_BLOCK", None])
def test_every_tensor_is_missed(preset: str | None, dense: Path, tmp_path: Path) -> None:
    """Whichever tensor is dropped, it is named."""
    folder = dense
    if preset:
        folder = tmp_path / "quantized"
        compress_folder(dense, folder, preset)
    assert len(_assert_all_needed(folder).headers) >= 21


def test_every_expert_tensor_is_missed(tmp_path: Path) -> None:
    """Experts that are written one by one, where the model keeps them in one parameter."""
    import compressor
    from tests.e2e.cases import write_recipe

    recipe = write_recipe(tmp_path / "r.yaml", tiny_llama4(tmp_path / "source"), "{scheme: nvfp4a16}")
    stored = _assert_all_needed(compressor.run(recipe, output=tmp_path / "out").output)
    assert any(".experts.3." in name for name in stored.headers)


def _gemma(folder: Path) -> Path:
    """A tiny random model with a vision tower, whose tensors have other names than its modules."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = sizes | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256}
    vision = sizes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_other_names_are_recognized(tmp_path: Path) -> None:
    """A checkpoint with other names than transformers writes today, but loads, is complete."""
    from transformers import AutoModelForImageTextToText

    folder = _gemma(tmp_path / "model")
    assert failed(folder) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    renamed = {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}
    assert len(renamed.keys() - read_tensors(folder).keys()) > 20
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert failed(folder) == {}
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n})
    assert "layers.1.mlp.up_proj.weight: missing" in failed(folder)["tensors"]


def test_configs_may_use_the_names_of_transformers(tmp_path: Path) -> None:
    """Some tools write the module names of transformers into the ignore list; engines map both."""
    folder = _gemma(tmp_path / "gemma")
    stored, _ = open_contents(folder)
    assert stored.config is not None
    expected = expected_tensors(stored.config, stored.headers)
    aliases = {name: alias for name, alias in expected.aliases.items() if name in expected.classes}
    assert "language_model.model.layers.0.mlp.up_proj" in aliases
    left = [alias for name, alias in aliases.items() if not name.endswith("mlp.down_proj")]
    compressed = tmp_path / "model"
    compress_folder(folder, compressed, "FP8_DYNAMIC")
    downs = {name for name in read_tensors(compressed) if name.endswith(".weight") and "_proj" in name}
    rewrite(compressed, lambda tensors: _restored(tensors, read_tensors(folder), downs))
    edit_config(compressed, lambda config: config["quantization_config"].update(ignore=left))
    assert failed(compressed) == {}


def _restored(tensors: Tensors, source: Tensors, names: set[str]) -> Tensors:
    """All matrices but ``mlp.down_proj`` as the source has them."""
    back = {name for name in names if not name.endswith("mlp.down_proj.weight")}
    kept = {name: t for name, t in tensors.items() if name.removesuffix("_scale") not in back}
    return kept | {name: source[name] for name in back}


def test_fused_matrices_are_stored_alike(dense: Path, tmp_path: Path) -> None:
    """Engines concatenate q, k and v: a format for one of them alone cannot be loaded."""
    folder = tmp_path / "model"
    compress_folder(dense, folder, "FP8_DYNAMIC")
    name = "model.layers.1.self_attn.k_proj"
    whole = read_tensors(dense)[f"{name}.weight"]
    rewrite(folder, lambda tensors: tensors | {f"{name}.weight": whole})
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != f"{name}.weight_scale"})
    edit_config(folder, lambda config: config["quantization_config"]["ignore"].append(name))
    assert failed(folder) == {
        "tensors": f"{name}, {name[:-6]}q_proj, {name[:-6]}v_proj: stored as 16 bit and float-quantized "
        "float8, but engines fuse them into one matrix: store them alike"
    }


def test_strangers_are_told(dense: Path, tmp_path: Path) -> None:
    """A tensor that the model has no place for; towers and draft layers are nobody's business here."""
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    extra = {
        "mtp.layers.0.up.weight": torch.ones(2, 2),
        "model.layers.2.mlp.up_proj.weight": torch.ones(2, 2),
    }
    extra["vision_tower.patch.bias"] = torch.ones(2)
    rewrite(folder, lambda tensors: tensors | extra)
    assert failed(folder) == {}
    rewrite(folder, lambda tensors: tensors | {"model.layers.0.mlp.extra.weight": torch.ones(2, 2)})
    assert failed(folder)["tensors"] == (
        "model.layers.0.mlp.extra.weight: LlamaForCausalLM has no place for it: config.json and weights are "
        "not of one model"
    )


def test_unknown_models_are_judged_by_name(dense: Path, tmp_path: Path) -> None:
    """Without a class of transformers, names tell linear layers; the check says so, and warns."""
    warned: list[str] = []

    class Heard(Silent):
        def warn(self, text: str) -> None:
            warned.append(text)

    folder = tmp_path / "model"
    compress_folder(dense, folder, "W4A16")
    edit_config(folder, lambda config: config.update(model_type="novel", architectures=["Novel"]))
    found = {check.name: check for check in check_structure(folder, Heard())}
    assert found["tensors"].status == found["shapes"].status == "passed"
    assert "told apart by name: transformers does not know model_type 'novel'" in found["tensors"].detail
    assert warned == ["linear layers are told apart by name: transformers does not know model_type 'novel'"]
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "0.mlp.up_proj.weight_s" not in n})
    edit_config(folder, lambda config: config["quantization_config"].update(ignore=[]))
    detail = failed(folder)["tensors"]
    assert "lm_head: not quantized" in detail
    assert "model.layers.0.mlp.up_proj.weight_scale" in detail
