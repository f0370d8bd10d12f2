"""Asking an engine in a process of its own: answers, failures of every sort, and nothing left running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compressor.verify.engine as engine
from compressor.errors import UserError
from compressor.progress import Silent
from compressor.verify.base import EngineAnswer, EngineRequest
from compressor.verify.engine import WORKER, ask, find_engine_python, read_answer, unsupported_here
from tests.verify.fake_vllm import FakeVllm, add_distribution, fake_vllm

REQUEST = EngineRequest("model", "auto", windows=[[1, 2, 3], [4, 5]], prompts=[[7, 8]], new_tokens=3)
Ask = Callable[..., EngineAnswer]


@pytest.fixture
def fake(tmp_path: Path) -> FakeVllm:
    """A fake vLLM."""
    return fake_vllm(tmp_path)


@pytest.fixture
def asked(fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks the fake; a plain model is in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "scratch").mkdir()

    def ask_fake(mode: str = "", timeout_s: float = 60.0, **env: str) -> EngineAnswer:
        return ask(
            Path(sys.executable),
            REQUEST,
            scratch=tmp_path / "scratch",
            timeout_s=timeout_s,
            progress=Silent(),
            extra_env=fake.env(mode) | env,
        )

    return ask_fake


def test_answer_holds_scores_and_continuations(asked: Ask) -> None:
    """Each token but a window's first gets its log-probability; continuations have the asked length."""
    answer = asked()
    assert answer.error is None
    assert answer.stage == "done"
    assert answer.logprobs == ((-0.2, -0.3), (-0.5,))
    assert answer.greedy == ((9, 10, 11),)
    assert (answer.engine, answer.version, answer.device) == ("vllm", "0.0.1", "cpu")
    assert answer.quantization == "compressed-tensors"
    assert set(answer.seconds) == {"import", "load", "score"}


def test_engine_is_loaded_safely_and_small(asked: Ask, fake: FakeVllm, tmp_path: Path) -> None:
    """No remote code, no pickles, no network; one short sequence at a time; the model's path is absolute."""
    asked()
    noted = fake.noted("load")
    assert noted["model"] == str(tmp_path / "model")
    settings = noted["settings"]
    assert settings["trust_remote_code"] is False
    assert settings["load_format"] == "safetensors"
    assert settings["enable_prefix_caching"] is False
    # The longest of a window and its one sampled token, and a prompt and its three.
    assert settings["max_model_len"] == 5
    assert settings["max_num_batched_tokens"] >= 5
    assert noted["env"]["HF_HUB_OFFLINE"] == "1"
    assert noted["env"]["VLLM_CPU_INT4_W4A8"] == "0"


@pytest.mark.parametrize(
    ("config", "dtype", "custom"),
    [({}, "float32", None), ({"quantization_config": {}}, "bfloat16", {"mode": 0, "custom_ops": ["none"]})],
    ids=["plain", "quantized"],
)
def test_auto_dtype_on_cpu(
    asked: Ask, fake: FakeVllm, tmp_path: Path, config: object, dtype: str, custom: object
) -> None:
    """float32 is exact, but kernels of quantized weights want 16 bit, where custom operations are wrong."""
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert asked().dtype == dtype
    assert fake.noted("load")["settings"].get("compilation_config") == custom


def test_our_python_does_not_leak(asked: Ask, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What steers our interpreter is kept from the engine's; what the user set for the engine is kept."""
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    asked()
    noted = fake.noted("load")
    assert noted["env"]["PYTHONPATH"] == str(fake.packages)
    assert not {"PYTHONWARNINGS", "VIRTUAL_ENV"} & set(noted["env"])
    assert noted["env"]["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert noted["env"]["PATH"].startswith(str(Path(sys.executable).parent))
    # Modules of this package are named so generally that the engine must not find them by accident.
    assert str(WORKER.parent) not in noted["path"]


@pytest.mark.parametrize("stage", ["import", "load", "score"])
def test_exception_is_told_with_its_stage(asked: Ask, stage: str) -> None:
    """The engine's own words, on one line, and how far it got."""
    answer = asked(f"raise in {stage}")
    assert answer.error == "ValueError: first line second line"
    assert answer.stage == stage
    assert answer.logprobs == ()
    assert answer.version == ("" if stage == "import" else "0.0.1")


@pytest.mark.parametrize("stage", ["import", "load", "score"])
def test_crash_is_told_with_signal_and_last_line(asked: Ask, stage: str) -> None:
    """A process that dies without a word still leaves its stage, its signal and its log."""
    answer = asked(f"crash in {stage}")
    assert answer.error == f"the engine was killed by SIGSEGV (stage: {stage}); its last line: last words"
    assert answer.stage == stage


def test_timeout_kills_the_whole_group(asked: Ask, fake: FakeVllm) -> None:
    """Neither the engine nor what it started outlives the time it was given."""
    answer = asked("hang in load", timeout_s=3.0)
    assert answer.error == "no answer within 3 s (stage: load)"
    assert answer.version == "0.0.1"
    assert fake.all_gone()


def test_interrupt_kills_the_whole_group(asked: Ask, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the engine, which does not hear it itself, in another group."""

    def interrupted(*_: object) -> bool:
        fake.noted("pids")
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked("hang in score")
    assert fake.all_gone()


def test_engine_does_not_outlive_a_killed_parent(fake: FakeVllm, tmp_path: Path) -> None:
    """SIGKILL leaves no chance to clean up; the engine notices by itself."""
    code = (
        "from pathlib import Path; import sys\n"
        "from compressor.progress import Silent\n"
        "from compressor.verify.base import EngineRequest\n"
        "from compressor.verify.engine import ask\n"
        "request = EngineRequest('model', 'float32', [[1, 2]], [], 1)\n"
        f"ask(Path(sys.executable), request, scratch=Path({str(tmp_path)!r}), timeout_s=600,\n"
        f"    progress=Silent(), extra_env={fake.env('hang in load')!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        fake.noted("pids")
    finally:
        parent.kill()
        parent.wait()
    assert fake.all_gone()


def test_answer_to_another_question_is_an_error(asked: Ask) -> None:
    """Missing tokens are not compared silently."""
    assert asked("answer too little").error == "the engine answered for other tokens than it was asked about"


@pytest.mark.parametrize(
    ("chosen", "found"), [(None, ("a", "b")), ("b,other", ("b",)), ("", ())], ids=["all", "some", "none"]
)
def test_plugins_of_others_are_named(
    asked: Ask, fake: FakeVllm, chosen: str | None, found: tuple[str, ...]
) -> None:
    """Anything that may have replaced a kernel is told; vLLM's own plug-ins are not worth a word."""
    points = "[vllm.general_plugins]\na = one.module:register\nb = two:register\nown = vllm.plugins.x:y\n"
    add_distribution(fake.packages, "two-plugins", points)
    answer = asked(**({} if chosen is None else {"VLLM_PLUGINS": chosen}))
    # This package's own is named too where it is installed, as in the environment of the tests.
    assert tuple(name for name in answer.plugins if name != "compressor_kv") == found


@pytest.mark.parametrize(
    "text", ['{"version": "0", "stage": "done", "logpr', "[1]", '{"logprobs": 5}', '{"seconds": "\xff"}', ""]
)
def test_a_broken_answer_is_told(text: str, tmp_path: Path) -> None:
    """A full disk cuts files off: one sentence and no traceback."""
    path = tmp_path / "answer.json"
    path.write_bytes(text.encode("latin-1"))
    answer = read_answer(path, REQUEST)
    assert answer.error is not None
    assert answer.error.startswith("the engine's answer is cut off or broken: ")
    assert unsupported_here(answer) is None
    path.unlink()
    assert read_answer(path, REQUEST).error is None


def _interpreter(path: Path, *, has_vllm: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {int(not has_vllm)}\n")
    path.chmod(0o755)
    return path


def test_interpreters_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given, named by the variable, the usual environment below the current folder, then none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMPRESS_ENGINE_PYTHON", raising=False)
    assert find_engine_python(None) is None
    usual = _interpreter(tmp_path / ".venv-serve/bin/python", has_vllm=True)
    assert find_engine_python(None) == usual
    named = _interpreter(tmp_path / "named", has_vllm=True)
    monkeypatch.setenv("COMPRESS_ENGINE_PYTHON", "named")
    assert find_engine_python(None) == named
    given = _interpreter(tmp_path / "given", has_vllm=True)
    assert find_engine_python(Path("given")) == given


def test_present_interpreter_is_the_last_resort(
    fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished usual environment is passed over; where vLLM is beside us, it is not imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMPRESS_ENGINE_PYTHON", raising=False)
    _interpreter(tmp_path / ".venv-serve/bin/python", has_vllm=False)
    monkeypatch.syspath_prepend(str(fake.packages))
    assert find_engine_python(None) == Path(sys.executable)
    assert "vllm" not in sys.modules


def test_linked_interpreter_is_not_resolved(tmp_path: Path) -> None:
    """An environment's bin/python is a link to the system's, which does not have its packages."""
    real = _interpreter(tmp_path / "real", has_vllm=True)
    link = tmp_path / "env/bin/python"
    link.parent.mkdir(parents=True)
    link.symlink_to(real)
    assert find_engine_python(link) == link


@pytest.mark.parametrize("kind", ["absent", "without vllm", "no program"])
def test_bad_interpreter_is_the_users_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whoever names one hears that it will not do, and what to do."""
    path = tmp_path / "python"
    if kind == "without vllm":
        _interpreter(path, has_vllm=False)
    elif kind == "no program":
        path.write_text("text")
    with pytest.raises(UserError, match=r"serve_env\.sh") as given:
        find_engine_python(path)
    assert given.value.where == "--engine-python"
    monkeypatch.setenv("COMPRESS_ENGINE_PYTHON", str(path))
    with pytest.raises(UserError, match=r"serve_env\.sh") as named:
        find_engine_python(None)
    assert named.value.where == "COMPRESS_ENGINE_PYTHON"


def _failed(error: str | None) -> EngineAnswer:
    return EngineAnswer("vllm", "0.32.0", "cpu", "float32", (), None, (), (), error, "load")


@pytest.mark.parametrize(
    "error",
    [
        "ValueError: Failed to find a kernel that can implement the MXFP4 linear layer. Reasons:",
        "ValueError: Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: no Marlin FP4",
        "NotImplementedError: No NvFp4 MoE backend supports the deployment configuration.",
        "ValueError: Unsupported FP8 MoE backend: NONE",
        "NotImplementedError: \"cpu_gemm_wna16\" not implemented for 'Float'",
        "RuntimeError: fp8_scaled_mm_cpu: expect A to be bfloat16 or half.",
        "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4. "
        "Declaration: _C::static_scaled_fp8_quant() -> ()",
        "NotImplementedError: Sparse Attention is not supported on CPU.",
    ],
)
def test_missing_kernels_are_no_fault_of_the_checkpoint(error: str) -> None:
    """Each is in vLLM 0.32's source; all but the last were raised on a CPU for checkpoints in order."""
    reason = unsupported_here(_failed(error))
    assert reason == f"vllm 0.32.0 cannot run this format on cpu: {error}"


@pytest.mark.parametrize(
    "error",
    [
        None,
        "KeyError: 'model.layers.0.mlp.down_proj.weight_scale'",
        "ValueError: There is no module or parameter named 'model.layers.0.x' in LlamaForCausalLM",
        "AssertionError: Attempted to load weight (torch.Size([3])) into parameter (torch.Size([4]))",
        "NotImplementedError: No compressed-tensors compatible scheme was found.",
        "the engine was killed by SIGKILL (out of memory?) (stage: load)",
    ],
)
def test_other_errors_are_not_excused(error: str | None) -> None:
    """A checkpoint that the engine stumbles over is not waved through."""
    assert unsupported_here(_failed(error)) is None


def test_worker_stands_alone() -> None:
    """It runs under an interpreter that does not have this package."""
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import runpy; runpy.run_path({str(WORKER)!r}); import sys; "
            "sys.exit(any(name.startswith('compressor') for name in sys.modules))",
        ],
        env={"PATH": os.environ["PATH"]},
        check=False,
    )
    assert done.returncode == 0
