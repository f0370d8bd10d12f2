"""``compress verify`` with the real engine: what agrees, what is refused, and what is caught only there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compressor.api import run
from compressor.progress import Silent
from compressor.report.model import load_report
from compressor.report.verification import EngineFacts, Verification
from compressor.verify.run import verify
from compressor.verify.spec import VerifySpec
from tests.cli.test_main import compress
from tests.e2e.cases import write_recipe
from tests.serve.families import FAMILIES, PREDICTING

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


def made(folder: Path, source: Path | str, scheme: str, dialect: str = "compressed-tensors") -> Path:
    """A checkpoint in ``folder``."""
    rest = f"evaluate: null\nexport: {{format: {dialect}}}"
    recipe = write_recipe(folder / "recipe.yaml", Path(source), f"{{scheme: {scheme}}}", rest)
    return run(recipe, output=folder / "out" / "result").output


def asked(
    folder: Path, python: Path, env: Mapping[str, str], **changes: object
) -> tuple[Verification, EngineFacts]:
    """A verification that insists on the engine, without the server."""
    given: dict[str, object] = {"engine": "vllm", "engine_python": python, "server": False, **changes}
    spec = VerifySpec(checkpoint=folder, cache=folder.parent, engine_env=env, **given)  # type: ignore[arg-type]
    found = verify(spec, Silent())
    assert found.engine is not None, found.checks
    return found, found.engine


def shipped(recipe: str, folder: Path) -> Path:
    """The result of a shipped recipe, not measured."""
    return run(f"recipes/{recipe}.yaml", overrides=["evaluate=null"], output=folder / "out" / recipe).output


def has_amx() -> bool:
    """Whether the CPU has the tiles that some of vLLM's kernels need."""
    return "amx_tile" in Path("/proc/cpuinfo").read_text()


# What the CPU build computes with kernels of its own, and what only with the dequantizing plug-in.
PLAIN = [
    ("llama", "int4", "compressed-tensors"),
    ("llama", "fp8_block", "compressed-tensors"),
    ("qwen3_moe", "int4", "compressed-tensors"),
]
EMULATED = [
    ("llama", "nvfp4a16", "compressed-tensors"),
    ("llama", "nvfp4a16", "modelopt"),
    ("llama", "mxfp4", "compressed-tensors"),
    pytest.param("llama", "fp8_dynamic", "modelopt", marks=pytest.mark.slow),
    ("mixtral", "nvfp4a16", "compressed-tensors"),
    *(
        pytest.param(family, "nvfp4a16", "compressed-tensors", marks=pytest.mark.slow)
        for family in PREDICTING
    ),
]


@pytest.mark.parametrize(("family", "scheme", "dialect"), PLAIN)
def test_kernels_agree(family: str, scheme: str, dialect: str, tmp_path: Path, engine_python: Path) -> None:
    """vLLM's own CPU kernels give the log-probabilities of the decoded weights."""
    result = made(tmp_path, FAMILIES[family](tmp_path / "source"), scheme, dialect)
    found, engine = asked(result, engine_python, {})
    if engine.verdict == "unsupported" and not has_amx():
        pytest.skip(engine.reason)
    assert engine.verdict == "agrees", engine.reason
    assert engine.plugins == ()
    assert engine.noise_floor_measured
    assert found.passed


@pytest.mark.parametrize(("family", "scheme", "dialect"), EMULATED)
def test_loader_and_layout_agree(
    family: str,
    scheme: str,
    dialect: str,
    tmp_path: Path,
    engine_python: Path,
    weight_only_env: Mapping[str, str],
) -> None:
    """vLLM's own loader reads names, layouts and scales as they are meant; its kernels are not run."""
    result = made(tmp_path, {**FAMILIES, **PREDICTING}[family](tmp_path / "source"), scheme, dialect)
    found, engine = asked(result, engine_python, weight_only_env)
    assert engine.verdict == "agrees", engine.reason
    assert engine.plugins
    assert found.passed


def drafted(result: Path, count: int, engine_python: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """What ``draft_worker.py`` prints."""
    worker = [str(engine_python), str(Path(__file__).with_name("draft_worker.py")), str(result), str(count)]
    done = subprocess.run(worker, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_its_own_prediction_layer_drafts(
    family: str, tmp_path: Path, engine_python: Path, weight_only_env: Mapping[str, str]
) -> None:
    """Carried in 16 bit, it is loaded so, and what it drafts changes no token."""
    result = made(tmp_path, PREDICTING[family](tmp_path / "source"), "nvfp4a16")
    plain, with_drafts = (drafted(result, count, engine_python, weight_only_env) for count in (0, 2))
    # On the CPU vLLM's latent attention changes tokens as it checks drafts, of the unquantized model too.
    assert with_drafts["tokens"] == plain["tokens"] or family == "deepseek_v3"
    assert with_drafts["drafted"] > 0
    assert with_drafts["quantized"] == []


@pytest.mark.slow
def test_a_prediction_layer_that_rules_quantize_drafts(
    tmp_path: Path, engine_python: Path, weight_only_env: Mapping[str, str]
) -> None:
    """vLLM takes its matrices for quantized, the experts among them, and no token changes."""
    source = PREDICTING["glm4_moe"](tmp_path / "source")
    rules = "[{match: 'model.layers.2.*_proj', scheme: nvfp4a16, solver: rtn}]"
    weights = f"{{scheme: nvfp4a16, ignore: ['*.eh_proj'], rules: {rules}}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, "evaluate: null")
    result = run(recipe, output=tmp_path / "out" / "result").output
    plain, with_drafts = (drafted(result, count, engine_python, weight_only_env) for count in (0, 2))
    assert with_drafts["tokens"] == plain["tokens"]
    assert with_drafts["drafted"] > 0
    kinds = {name.rpartition("mtp_block.")[2] for name in with_drafts["quantized"]}
    assert {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_experts.down_proj"} <= kinds
    assert any("experts" in kind and "shared" not in kind for kind in kinds)


def test_a_format_without_kernel_is_told_apart(tmp_path: Path, engine_python: Path) -> None:
    """Not a fault of the checkpoint, but no proof either: who insists on the engine gets exit code 1."""
    result = made(tmp_path, FAMILIES["llama"](tmp_path / "source"), "nvfp4a16")
    found, engine = asked(result, engine_python, {})
    assert engine.verdict == "unsupported", engine.reason
    assert not found.passed
    assert all(check.status != "failed" for check in found.checks)
    best_effort, _ = asked(result, engine_python, {}, engine="auto")
    assert best_effort.passed


@pytest.mark.skipif(not has_amx(), reason="only the kernel for AMX rounds them")
def test_silently_rounded_activations_are_caught(tmp_path: Path, engine_python: Path) -> None:
    """A setting of vLLM under which INT4 loads, reads fluently and is wrong; a trained model shows it."""
    result = shipped("smollm2-int4", tmp_path)
    found, engine = asked(result, engine_python, {"VLLM_CPU_INT4_W4A8": "1"})
    assert engine.verdict == "disagrees", engine.reason
    assert not found.passed


def test_an_engine_that_reads_another_checkpoint_is_caught(
    tmp_path: Path, engine_python: Path, weight_only_env: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's numbers are compared with the decoded weights, not with themselves."""
    from compressor.verify import serving
    from tests.verify.corrupt import corrupt

    result = made(tmp_path, FAMILIES["llama"](tmp_path / "source"), "nvfp4a16")
    other = tmp_path / "other"
    shutil.copytree(result, other)
    corrupt(other, "double_scale")
    ask = serving.ask

    def astray(python, request, **options):  # type: ignore[no-untyped-def]
        if request.model == str(result):
            request = type(request)(**{**request.to_json(), "model": str(other)})
        return ask(python, request, **options)

    monkeypatch.setattr(serving, "ask", astray)
    found, engine = asked(result, engine_python, weight_only_env)
    assert engine.verdict == "disagrees", engine.reason
    assert not found.passed


def test_a_shipped_recipe_on_the_command_line(tmp_path: Path, engine_python: Path) -> None:
    """As a user would: verify the folder, server included; the report keeps the verdict."""
    result = shipped("smollm2-int4", tmp_path)
    options = ("--engine", "vllm", "--engine-python", str(engine_python), "--json", "-q")
    verified = compress("verify", str(result), *options, cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr + verified.stdout
    engine = json.loads(verified.stdout)["engine"]
    assert engine["verdict"] == "agrees"
    assert engine["tokens"] >= 200
    assert "/v1/completions" in engine["server"]
    recorded = load_report(result).verification
    assert recorded is not None
    assert recorded.engine is not None
    assert recorded.engine.verdict == "agrees"


@pytest.mark.parametrize("recipe", ["smollm2-nvfp4", "smollm2-fp8"])
def test_shipped_recipes_emulated(
    recipe: str, tmp_path: Path, engine_python: Path, weight_only_env: Mapping[str, str]
) -> None:
    """The CPU build has no kernel for NVFP4, and takes minutes a token for FP8 activations."""
    _, engine = asked(shipped(recipe, tmp_path), engine_python, weight_only_env)
    assert engine.verdict == "agrees", engine.reason
