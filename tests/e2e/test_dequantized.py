"""Results of this program as sources of another run: ``model.from: dequantize`` from recipe to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.sources import open_source
from compressor.cli.main import _run as compress
from compressor.errors import CheckpointError
from compressor.model.load import load_source_model
from compressor.progress import Silent
from compressor.verify.inputs import find_source, own_folder, plain_folder
from tests.tiny import tiny_llama, tiny_model, tokens_of_bytes

from .cases import write_recipe

SCHEMES = ["nvfp4a16", "fp8_block", "{kind: int4, group_size: 32}"]
STREAM = "{scheme: fp8_dynamic}"
GPTQ = "{scheme: {kind: int4, group_size: 64}, solver: gptq}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two blocks, a text to calibrate on and one to measure on."""
    root = tmp_path_factory.mktemp("dequantized")
    tiny_llama(root / "model", hidden=128, intermediate=256, heads=2, kv_heads=2)
    (root / "calibration.txt").write_text("A quick red hen runs over the busy cat. " * 40)
    (root / "heldout.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return root


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request: pytest.FixtureRequest, root: Path) -> Path:
    """The model as compressed by one scheme."""
    folder = root / f"scheme-{SCHEMES.index(request.param)}"
    folder.mkdir()
    recipe = write_recipe(folder / "first.yaml", root / "model", f"{{scheme: {request.param}}}")
    return compressor.run(recipe, output=folder / "quantized").output


def _run(folder: Path, name: str, source: Path, weights: str, *, dequantize: bool) -> Path:
    """The output of a calibrated, measured recipe."""
    root = folder.parent
    texts = {name: json.dumps(str(root / f"{name}.txt")) for name in ("calibration", "heldout")}
    calibrated = f"{{datasets: [{{path: {texts['calibration']}}}], num_samples: 4, sequence_length: 64}}"
    path = folder / f"{name}.yaml"
    path.write_text(
        f"model: {{source: {json.dumps(str(source))}{', from: dequantize' if dequantize else ''}}}\n"
        f"weights: {weights}\n{f'calibration: {calibrated}' if weights == GPTQ else ''}\n"
        f"evaluate: {{text: {texts['heldout']}, tokens: 256, context: 64}}\n"
    )
    return compressor.run(path, output=folder / name, workspace=folder / f"{name}-work").output


@pytest.mark.parametrize("weights", [STREAM, GPTQ])
def test_the_same_result_as_from_the_dequantized_model(quantized: Path, weights: str) -> None:
    """Stream and walk: equal bit for bit to a run on the bfloat16 checkpoint, quality figures included."""
    folder = quantized.parent
    kind = "gptq" if weights == GPTQ else "stream"
    plain = folder / f"plain-{kind}" / "source"
    if not plain.exists():
        plain.parent.mkdir()
        plain = plain_folder(open_source(str(quantized), from_="dequantize"), plain.parent)
    ours = _run(folder, f"ours-{kind}", quantized, weights, dequantize=True)
    theirs = _run(folder, f"theirs-{kind}", plain, weights, dequantize=False)
    mine, other = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)), name
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    mine_report, other_report = (json.loads((path / "report.json").read_text()) for path in (ours, theirs))
    assert mine_report["quality"]["kl"] == other_report["quality"]["kl"]
    assert mine_report["source"]["kind"] == "dequantized"
    assert mine_report["source"]["bytes"] == other_report["source"]["bytes"]
    assert "dequantized from compressed-tensors" in mine_report["source"]["note"]
    card = (ours / "README.md").read_text()
    assert "dequantized from compressed-tensors" in card
    assert f"--source {quantized} --from dequantize" in card
    assert "  from: dequantize\n" in (ours / "recipe.yaml").read_text()


def test_commands(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan, run --smoke, eval and verify's source on a quantized source; refused where nobody asked."""
    folder = root / "commands"
    folder.mkdir()
    first = write_recipe(folder / "first.yaml", root / "model", "{scheme: nvfp4a16}")
    quantized = compressor.run(first, output=folder / "quantized").output
    output = _run(folder, "second", quantized, STREAM, dequantize=True)
    recipe = str(folder / "second.yaml")

    assert compress(["plan", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["kind"] == "dequantized"
    assert compress(["plan", recipe, "--set", "model.from=null"]) == 2
    assert "model.from: dequantize" in capsys.readouterr().err

    assert compress(["run", recipe, "--smoke", "--workspace", str(folder / "smoke")]) == 0
    assert "dequantized from" in capsys.readouterr().out

    measured = ["eval", str(output), "--source", str(quantized), "--text", str(root / "heldout.txt")]
    measured += ["--tokens", "128", "--context", "64", "--json"]
    assert compress(measured) == 2
    assert "--from dequantize" in capsys.readouterr().err
    assert compress([*measured, "--from", "dequantize"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["kl"]["mean"] < 0.25

    source = find_source(output, None, None, folder / "cache", Silent())
    assert source is not None
    assert (source.kind, own_folder(source)) == ("dequantized", None)


def _fp8_experts(folder: Path) -> None:
    """Turns the projections of a model into FP8 blocks of 16 x 16, as DeepSeek-V3 stores them."""
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape[0] // 16, weight.shape[1] // 16
            blocks = weight.float().reshape(rows, 16, columns, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = blocks / scale[:, None, :, None]
            tensors[name] = codes.reshape(weight.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    _rewrite(folder, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]})


def _mxfp4_experts(folder: Path) -> None:
    """Gives a gpt-oss random experts in MXFP4."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, wide, rows = tensors.pop(name).shape
        codes = torch.randint(256, (experts, rows, wide // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = codes
        tensors[f"{name}_scales"] = torch.randint(121, 124, codes.shape[:3], dtype=torch.uint8)
    _rewrite(folder, tensors, {"quant_method": "mxfp4"})


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_other_methods(family: str, root: Path, tmp_path: Path) -> None:
    """DeepSeek-V3 in FP8 and gpt-oss in MXFP4: the model that transformers dequantizes, and a run on it."""
    import transformers

    widths = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    widths |= {"num_experts_per_tok": 2, **tokens_of_bytes()}
    if family == "gpt_oss":
        config: Any = transformers.GptOssConfig(
            **widths, num_local_experts=4, num_key_value_heads=2, head_dim=16, rope_parameters=None
        )
        tiny_model(tmp_path / "m", transformers.GptOssForCausalLM, config, torch.bfloat16)
        _mxfp4_experts(tmp_path / "m")
        how: Any = transformers.Mxfp4Config(dequantize=True)
    else:
        heads = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
        experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
        config = transformers.DeepseekV3Config(
            **widths, **heads, **experts, v_head_dim=16, first_k_dense_replace=1, num_key_value_heads=4
        )
        tiny_model(tmp_path / "m", transformers.DeepseekV3ForCausalLM, config, torch.bfloat16)
        _fp8_experts(tmp_path / "m")
        how = transformers.FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=how, dtype=torch.bfloat16
    ).float()
    ours = load_source_model(open_source(str(tmp_path / "m"), from_="dequantize"), torch.float32)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name, parameter in mine.items():
        assert torch.equal(parameter, other[name]), name
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(tmp_path / 'm'))}, from: dequantize}}\nweights: {{scheme: int8}}\n"
        f"evaluate: {{text: {json.dumps(str(root / 'heldout.txt'))}, tokens: 128, context: 64}}\n"
    )
    report = compressor.run(recipe, output=tmp_path / "out").report
    assert report.quality is not None
    assert report.quality.kl.mean < 0.1


def test_nothing_to_dequantize(root: Path, tmp_path: Path) -> None:
    """A plain source with the key is a fault: the recipe expects another one."""
    recipe = tmp_path / "r.yaml"
    source = json.dumps(str(root / "model"))
    recipe.write_text(f"model: {{source: {source}, from: dequantize}}\nweights: {STREAM}\n")
    with pytest.raises(CheckpointError, match="has no quantization_config"):
        compressor.plan(recipe)
