"""KV formats by name: what each stores in which layer, and ``compress eval --kv`` from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import compressor
from compressor.cli.main import _run as compress
from compressor.errors import CheckpointError, UserError
from compressor.kv.cache import uniform_layers
from compressor.kv.formats import FORMATS
from compressor.kv.layer import PackedLayer
from compressor.kv.plan import KvPlan, LayerPlan
from compressor.progress import Silent
from compressor.stages.kv_evaluate import check_kv_formats, kv_variants, plan_modes
from tests.e2e.cases import write_recipe
from tests.evals.kv_models import ids
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama


def _config(layers: int, head_dim: int = 16) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=layers
    )


@pytest.mark.parametrize(
    ("layers", "packed"), [(30, list(range(2, 28))), (5, [2]), (4, []), (3, [1]), (1, [0])]
)
def test_presets_spare_the_ends_of_dense_models(layers: int, packed: list[int]) -> None:
    """vLLM's ``get_boundary_skip_layers``, worked out by hand; formats without ends take every layer."""
    found = uniform_layers(_config(layers), FORMATS["turboquant_4bit_nc"])
    assert sorted(found) == packed
    assert sorted(uniform_layers(_config(layers), FORMATS["fp8"])) == list(range(layers))


def test_presets_spare_nothing_of_hybrids(tmp_path: Path) -> None:
    """Qwen3-Next's one layer of full attention is its last."""
    model = AutoModelForCausalLM.from_pretrained(FAMILIES["qwen3_next"](tmp_path))
    model.config.head_dim = 16
    assert sorted(uniform_layers(model.config, FORMATS["turboquant_4bit_nc"])) == [1]


def test_models_that_a_format_does_not_fit_are_refused(tmp_path: Path) -> None:
    """Heads that are no power of two; no full attention at all; latent attention."""
    with pytest.raises(UserError, match="power of two"):
        uniform_layers(_config(8, head_dim=48), FORMATS["turboquant_4bit_nc"])
    mistral = AutoModelForCausalLM.from_pretrained(FAMILIES["mistral"](tmp_path / "mistral")).config
    with pytest.raises(UserError, match="no layer of this model has full attention: fp8 would store nothing"):
        uniform_layers(mistral, FORMATS["fp8"])
    deepseek = AutoModelForCausalLM.from_pretrained(FAMILIES["deepseek_v3"](tmp_path / "mla")).config
    with pytest.raises(CheckpointError, match="multi-head latent attention"):
        kv_variants(deepseek, ["fp8"], "strict", tmp_path, Silent())


def test_only_turboquant_leaves_prompts_raw(tmp_path: Path) -> None:
    """In mode ``vllm`` the other formats are read from the cache at once."""
    names = ["turboquant_4bit_nc", "int4_per_token_head"]
    for mode in ("strict", "vllm"):
        modes = {}
        for variant in kv_variants(_config(6), names, mode, tmp_path, Silent()):
            modes[variant.name] = {
                layer.mode for layer in variant.make().layers if isinstance(layer, PackedLayer)
            }
        assert modes == {names[0]: {mode}, names[1]: {"strict"}}


class _Warnings(Silent):
    def __init__(self) -> None:
        self.found: list[str] = []

    def warn(self, text: str) -> None:
        self.found.append(text)


def test_a_format_that_stores_nothing_is_warned_of(tmp_path: Path) -> None:
    """All four layers are ends."""
    progress = _Warnings()
    variants = kv_variants(_config(4), ["turboquant_3bit_nc", "fp8"], "strict", tmp_path, progress)
    assert [variant.name for variant in variants] == ["turboquant_3bit_nc", "fp8"]
    assert len(progress.found) == 1
    assert "turboquant_3bit_nc stores nothing" in progress.found[0]


def test_names_are_checked(tmp_path: Path) -> None:
    """Unknown with the known ones; twice."""
    check_kv_formats(["fp8", "bf16"], tmp_path)
    with pytest.raises(
        UserError, match=r"unknown KV-cache format 'fp7'; did you mean 'fp8'\? \(known: bf16, fp8"
    ):
        check_kv_formats(["bf16", "fp7"], tmp_path)
    with pytest.raises(UserError, match="named twice"):
        check_kv_formats(["fp8", "fp8"], tmp_path)
    with pytest.raises(CheckpointError, match="there is no kv_plan"):
        check_kv_formats(["plan"], tmp_path)


def test_compress_eval_measures_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table and JSON of an unquantized checkpoint against itself; 16 bit loses less than 4 of them."""
    model = str(tiny_llama(tmp_path / "model", layers=6, dtype=torch.float32))
    text = tmp_path / "text.txt"
    text.write_text(bytes(ids(200).tolist()).decode())
    words = ["eval", model, "--source", model, "--text", str(text), "--context", "64", "--quiet"]
    formats = "bf16, int4_per_token_head,turboquant_4bit_nc"
    measured = [*words, "--kv", formats, "--kv-needle", "160"]
    assert compress([*measured, "--json", "--kv-mode", "vllm"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"]["mean"] == 0
    kv = {result["format"]: result for result in found["kv"]}
    assert list(kv) == ["bf16", "int4_per_token_head", "turboquant_4bit_nc"]
    # Head size 16: 8 + 4 bytes; 10 + 12 in two of six layers, 64 in four; of 64.
    assert [result["bits"] for result in kv.values()] == [
        16.0,
        16 * 24 / 64,
        16 * (2 * 22 + 4 * 64) / (6 * 64),
    ]
    assert kv["bf16"]["kl"]["mean"] < 1e-3 < kv["int4_per_token_head"]["kl"]["mean"]
    assert {result["mode"] for result in found["kv"]} == {"vllm"}
    assert [cell["tokens"] for cell in kv["bf16"]["needle"]["cells"]] == [160] * 5

    assert compress(measured) == 0
    shown = capsys.readouterr().out
    assert "KV cache against 16 bit, read as stored (ppl: perplexity)" in shown
    assert all(len(line) <= 80 for line in shown.splitlines()[-12:])
    assert "160 tokens" in shown
    for line in shown.splitlines():
        if line.startswith("int4_per_token_head"):
            assert " 6.00 " in line or "of 0" in line


def _plan(head_dim: int = 16, layer: int = 1) -> KvPlan:
    """8-bit integers in one layer, between two 16-bit tokens at either end."""
    codecs = FORMATS["int8_per_token_head"].make
    assert codecs is not None
    packed = LayerPlan("int8_per_token_head", 2, head_dim, *codecs())
    return KvPlan({0: LayerPlan("bf16", 2, 16), layer: packed}, sink_tokens=2, recent_tokens=16)


def test_the_checkpoints_own_plan_is_a_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its layers, sinks and windows; chunks are an eighth of the window."""
    folder = tiny_llama(tmp_path / "model", dtype=torch.float32)
    _plan().write(folder)
    (variant,) = kv_variants(_config(2), ["plan"], "vllm", folder, Silent())
    assert (variant.recent_tokens, variant.chunk_tokens) == (16, 2)
    layers = variant.make().layers
    assert [isinstance(layer, PackedLayer) for layer in layers] == [False, True]
    assert layers[1].mode == "vllm"
    text = tmp_path / "text.txt"
    text.write_text(bytes(ids(96).tolist()).decode())
    words = ["eval", str(folder), "--source", str(folder), "--text", str(text), "--context", "48", "--quiet"]
    assert compress([*words, "--kv", "plan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kv"][0]
    # Layer 0 in 16 bit; of layer 1, 18 of 48 tokens are, the others take 16 + 4 bytes on each side.
    assert found["stored_bytes"] == 2 * 2 * (48 * 32 + 18 * 32 + 30 * 20)
    assert 0 < found["kl"]["mean"] < 0.01


def test_a_run_measures_the_plan_beside_its_result(tmp_path: Path) -> None:
    """``evaluate`` of a result with a plan has its figures; without one, none."""
    source = tiny_llama(tmp_path / "model", dtype=torch.float32)
    text = tmp_path / "text.txt"
    text.write_text(bytes(ids(200).tolist()).decode())
    rest = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 128, context: 64}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: int8}", rest)
    output = tmp_path / "out" / "result"
    assert compressor.run(recipe, output=output).passed
    assert compressor.evaluate(recipe, output=output).kv == ()
    _plan().write(output)
    (found,) = compressor.evaluate(recipe, output=output).kv
    assert (found.format, found.mode, found.text.tokens) == ("plan", "strict", 128)
    assert found.bits < 16


@pytest.mark.parametrize("plan", [_plan(head_dim=32), _plan(layer=5)], ids=["heads", "layers"])
def test_a_plan_of_another_model_is_refused(plan: KvPlan, tmp_path: Path) -> None:
    """Before anything is computed with it."""
    plan.write(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"layer \d of the plan, 2 KV heads of \d+, is none of this model"
    ):
        kv_variants(_config(2), ["plan"], "strict", tmp_path, Silent())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kv", "fp8,turbo"], "unknown KV-cache format 'turbo'"),
        (["--kv", "plan"], "there is no kv_plan.json"),
        (["--kv", "fp8", "--kv-needle", "many"], "--kv-needle 'many' is no list of lengths"),
        (["--kv", "fp8", "--kv-needle", "4096"], "4096 tokens is longer than the model's 512"),
        (["--kv-mode", "vllm"], "say how --kv measures"),
    ],
)
def test_faults_are_one_message(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, no traceback."""
    model = str(tiny_llama(tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text("a few words " * 20)
    assert compress(["eval", model, "--source", model, "--text", str(text), "--context", "32", *words]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert told in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "modes"),
    [("turboquant_4bit_nc", ("strict", "vllm")), ("turboquant_3.5bit", ("strict",)), ("fp8", ("strict",))],
)
def test_only_what_vllm_serves_is_read_as_vllm_reads(
    name: str, modes: tuple[str, ...], tmp_path: Path
) -> None:
    """Our own TurboQuant formats bear the name, and vLLM has them not."""
    make = FORMATS[name].make
    assert make is not None
    KvPlan({0: LayerPlan(name, 2, 32, *make())}).write(tmp_path)
    assert plan_modes(tmp_path) == modes
