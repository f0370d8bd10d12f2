"""Asks vLLM, in an environment and a process of its own, what it makes of a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from compressor.errors import UserError
from compressor.progress import Progress
from compressor.verify.base import EngineAnswer, EngineRequest
from compressor.verify.process import ended, engine_environment, how_it_ended, last_line, running

PYTHON_VARIABLE = "COMPRESS_ENGINE_PYTHON"
USUAL_PYTHON = Path(".venv-serve/bin/python")
WORKER = Path(__file__).with_name("vllm_worker.py")

_FIX = "make an environment with `bash scripts/serve_env.sh`, and name its bin/python"
_PROBE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_PROBE_TIMEOUT_S = 60.0
_REASON_CHARS = 400

# What vLLM 0.32 raises where it knows a format and lacks the code for it on this device.
_NO_KERNEL = re.compile(
    "|".join(
        (
            # model_executor/kernels/linear/__init__.py
            r"Failed to find a kernel that can implement the",
            r"Forced \w+ kernel \w+ is not supported",
            # model_executor/layers/fused_moe/oracle/*.py
            r"No [\w ]*MoE backend",
            r"Unsupported \w+ MoE backend: NONE",
            r"(?:not|only) supported on (?:the )?(?:CPU|current)",
            # model_executor/layers/fused_moe/experts/cpu_moe.py and others
            r"NotImplementedError: \w+(?: \([^)]*\))? does not support",
            # platforms/interface.py, config/vllm.py, quantization/compressed_tensors/compressed_tensors.py
            r"quantization is currently not supported in",
            r"not supported for the current GPU",
            # Operations that this build was compiled without, as a stub, or for other dtypes.
            r"'_OpNamespace' '\w+' object has no attribute",
            r"Declaration: \w+::\w+\(\) -> \(\)",
            r"\"\w+\" not implemented for '(?:Float|Half|BFloat16)'",
            r"expect A to be bfloat16 or half",
        )
    )
)


def find_engine_python(given: Path | None, checkpoint: Path | None = None) -> Path | None:
    """The interpreter of an environment that has vLLM, or None.

    The first of: ``given``, the variable ``COMPRESS_ENGINE_PYTHON``, ``.venv-serve/bin/python`` below the
    current folder, the present interpreter. Nothing of vLLM is imported. From inside ``checkpoint``, which
    may be a stranger's, none below the current folder is run unless it is named.

    Raises:
        UserError: the one that was given, or that the variable names, is no interpreter or has no vLLM.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if given is not None:
        return _checked(given, "--engine-python")
    if named:
        return _checked(Path(named), PYTHON_VARIABLE)
    usual = USUAL_PYTHON.absolute()
    theirs = checkpoint is not None and Path.cwd().is_relative_to(checkpoint.resolve())
    if not theirs and usual.is_file() and _has_vllm(usual):
        return usual
    return Path(sys.executable) if importlib.util.find_spec("vllm") is not None else None


def ask(
    python: Path,
    request: EngineRequest,
    *,
    scratch: Path,
    timeout_s: float,
    progress: Progress,
    extra_env: Mapping[str, str] | None = None,
) -> EngineAnswer:
    """Loads and scores a model in a process of its own; every failure is told in the answer's ``error``.

    Args:
        python: from ``find_engine_python``.
        request: what to load and what to score.
        scratch: an existing folder for the question, the answer and the engine's log.
        timeout_s: seconds after which the engine is killed.
        progress: hears where the log is.
        extra_env: environment variables on top of ours.
    """
    folder = Path(mkdtemp(prefix="ask-", dir=scratch))
    question, answer_path, log = (folder / name for name in ("request.json", "answer.json", "engine.log"))
    # The engine runs in another folder.
    request = replace(request, model=str(Path(request.model).absolute()))
    question.write_text(json.dumps(request.to_json()), encoding="utf-8")
    progress.log(f"the engine's log: {log}")
    command = [str(python), str(WORKER), str(question), str(answer_path)]
    env = engine_environment(python, extra_env or {})
    with running(command, log=log, env=env) as process:
        in_time = ended(process, timeout_s)
    answer = read_answer(answer_path, request)
    if answer.error is not None or answer.stage == "done":
        return _complete(answer, request)
    if not in_time:
        return replace(answer, error=f"no answer within {timeout_s:.0f} s (stage: {answer.stage})")
    said = last_line(log)
    died = f"the engine {how_it_ended(process)} (stage: {answer.stage})"
    return replace(answer, error=f"{died}; its last line: {said}" if said else died)


def unsupported_here(answer: EngineAnswer) -> str | None:
    """One sentence if the engine says that it lacks the code for this format on its device, else None.

    Such an error is no fault of the checkpoint; the phrases are those of vLLM 0.32.
    """
    if answer.error is None or not _NO_KERNEL.search(answer.error):
        return None
    where = f" on {answer.device}" if answer.device else ""
    return f"{answer.engine} {answer.version} cannot run this format{where}: {answer.error[:_REASON_CHARS]}"


def _checked(python: Path, where: str) -> Path:
    # Not resolved: what a link in an environment points to does not know the environment.
    path = python.expanduser().absolute()
    if not path.is_file():
        raise UserError(f"no such interpreter: {python}", where=where, fix=_FIX)
    if not _has_vllm(path):
        raise UserError(f"{python} is no Python that has vLLM", where=where, fix=_FIX)
    return path


def _has_vllm(python: Path) -> bool:
    """Whether an interpreter finds a package vllm; False where it cannot be run at all."""
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE],
            env=engine_environment(python, {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def read_answer(path: Path, request: EngineRequest) -> EngineAnswer:
    """The answer to ``request``, as far as the engine's process got; a broken file becomes its ``error``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return _from_json(found, request)
    except FileNotFoundError:
        return _from_json({}, request)
    except (ValueError, TypeError, AttributeError) as error:  # cut off, or of another shape
        reason = " ".join(str(error).split())[:_REASON_CHARS]
        return _from_json({"error": f"the engine's answer is cut off or broken: {reason}"}, request)


def _from_json(found: dict[str, Any], request: EngineRequest) -> EngineAnswer:
    return EngineAnswer(
        engine="vllm",
        version=found.get("version", ""),
        device=found.get("device", ""),
        dtype=found.get("dtype", request.dtype),
        plugins=tuple(found.get("plugins", ())),
        quantization=found.get("quantization"),
        logprobs=tuple(tuple(window) for window in found.get("logprobs", ())),
        greedy=tuple(tuple(tokens) for tokens in found.get("greedy", ())),
        error=found.get("error"),
        stage=found.get("stage", "import"),
        seconds=found.get("seconds", {}),
    )


def _complete(answer: EngineAnswer, request: EngineRequest) -> EngineAnswer:
    """The answer, with an error where it does not fit the question."""
    if answer.error is None and (
        [len(window) for window in answer.logprobs] != [len(window) - 1 for window in request.windows]
        or [len(tokens) for tokens in answer.greedy] != [request.new_tokens] * len(request.prompts)
    ):
        return replace(answer, error="the engine answered for other tokens than it was asked about")
    return answer
