"""The engine's side of a verification: for the interpreter that has vLLM, so it imports nothing from here.

``vllm_worker.py REQUEST.json ANSWER.json`` loads a model, scores token windows and writes the answer, also
when it fails (``EngineRequest`` and ``EngineAnswer`` in ``base.py`` describe both files).
``vllm_worker.py serve MODEL DTYPE PORT`` becomes vLLM's OpenAI-compatible server on 127.0.0.1.

The settings are those under which vLLM 0.32 agrees with transformers; on CPU, others load, read fluently and
are wrong.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import distributions, entry_points
from pathlib import Path
from runpy import run_module
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Otherwise vLLM rounds the activations of INT4 checkpoints to 8 bits on CPUs with AMX.
    "VLLM_CPU_INT4_W4A8": "0",
    # GiB; half of the memory by default.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # FlashInfer compiles its sampler at the first start.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
KV_CACHE_BYTES = 2**30
# vLLM's own default; models with an image encoder refuse much smaller budgets.
LEAST_BATCHED_TOKENS = 2048
SERVED_TOKENS = 2048
ERROR_CHARS = 2000


def main(arguments: list[str]) -> int:
    """Runs one of the two commands; returns the exit status."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _die_with_parent()
    if arguments[:1] == ["serve"]:
        _, model, dtype, port = arguments
        _serve(model, dtype, int(port))
        return 0
    # One process: loading takes seconds instead of a minute, and exceptions arrive here.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    request_path, answer_path = map(Path, arguments)

    def write(answer: dict[str, Any]) -> None:
        unfinished = answer_path.with_name(f"{answer_path.name}.unfinished")
        unfinished.write_text(json.dumps(answer), encoding="utf-8")
        unfinished.replace(answer_path)

    answer = _answer(json.loads(request_path.read_text(encoding="utf-8")), write)
    return 0 if answer["error"] is None else 1


def _die_with_parent() -> None:
    """Where standard input is a pipe and this process leads its group, its end kills the group.

    The parent holds the other end: no engine outlives a parent that had no chance to clean up.
    """
    if os.getpgrp() != os.getpid() or not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _answer(request: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The fields of an ``EngineAnswer``; every failure of the engine becomes its ``error``.

    Written at each stage, so that a crash of the process leaves the stage at which it came.
    """
    answer: dict[str, Any] = {
        "engine": "vllm",
        "version": "",
        "device": "",
        "dtype": request["dtype"],
        "plugins": [],
        "quantization": None,
        "logprobs": [],
        "greedy": [],
        "error": None,
        "stage": "import",
        "seconds": {},
    }
    started = time.monotonic()

    def reached(stage: str) -> None:
        now = time.monotonic()
        answer["seconds"][answer["stage"]] = now - started - sum(answer["seconds"].values())
        answer["stage"] = stage
        write(answer)

    write(answer)
    try:
        import vllm

        answer |= _about(vllm, request["model"], request["dtype"])
        if answer["device"] == "cpu":
            _permit_tiles()
        reached("load")
        llm = _load(vllm, request, answer["device"], answer["dtype"])
        answer["quantization"] = llm.llm_engine.model_config.quantization
        reached("score")
        answer["logprobs"] = _score(vllm, llm, request["windows"])
        answer["greedy"] = _continue(vllm, llm, request["prompts"], request["new_tokens"])
        reached("done")
    except Exception as error:  # an engine raises anything; the parent wants to know what
        traceback.print_exc()
        answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_CHARS]
        write(answer)
    return answer


def _about(vllm: Any, model: str, dtype: str) -> dict[str, Any]:
    """Version, device, the dtype that ``auto`` means there, and other packages' plug-ins."""
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    chosen = os.environ.get("VLLM_PLUGINS")
    plugins = {
        point.name
        for point in entry_points(group="vllm.general_plugins")
        if point.module.partition(".")[0] != "vllm" and (chosen is None or point.name in chosen.split(","))
    }
    return {
        "version": vllm.__version__,
        "device": "cpu" if cpu else current_platform.get_device_name(),
        "dtype": dtype if dtype != "auto" else _usual_dtype(model, cpu),
        "plugins": sorted(plugins),
    }


def _served(model: str) -> int:
    """Tokens of a request to the server: enough for a chat template's own words."""
    config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    positions = config.get("text_config", config).get("max_position_embeddings")
    return min(SERVED_TOKENS, positions) if isinstance(positions, int) else SERVED_TOKENS


def _permit_tiles() -> None:
    """Asks the system for the AMX registers, as programs must; vLLM's INT4 kernel uses them unasked (0.32).

    Without it the process dies of an illegal instruction, unless some other operation has asked before.
    """
    import torch

    if torch.cpu.get_capabilities().get("amx_tile"):
        torch.cpu._init_amx()


def _usual_dtype(model: str, cpu: bool) -> str:
    """The most exact dtype with kernels: on CPU, those of INT4, INT8 and FP8 weights want 16 bit (0.32)."""
    if not cpu:
        return "bfloat16"
    config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    quantized = "quantization_config" in config or Path(model, "hf_quant_config.json").is_file()
    return "bfloat16" if quantized else "float32"


def _settings(device: str, dtype: str, max_model_len: int) -> dict[str, Any]:
    """Engine arguments for one sequence at a time, as small and as plain as it gets."""
    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": 1,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        # Only checked at the start, as the line above decides: other processes may share the device.
        "gpu_memory_utilization": 0.1,
        "enforce_eager": True,
    }
    if device == "cpu" and dtype != "float32":
        # The C++ operations, rotary embedding among them, are wrong in 16 bit (vllm-cpu 0.32).
        settings["compilation_config"] = {"mode": 0, "custom_ops": ["none"]}
    return settings


def _load(vllm: Any, request: dict[str, Any], device: str, dtype: str) -> Any:
    """The model in the engine, without tokenizer."""
    windows, prompts = request["windows"], request["prompts"]
    longest = max([len(ids) + 1 for ids in windows] + [len(ids) + request["new_tokens"] for ids in prompts])
    return vllm.LLM(
        request["model"],
        skip_tokenizer_init=True,
        # Each prompt is computed in one piece, whatever was computed before it.
        enable_prefix_caching=False,
        max_num_batched_tokens=max(longest, LEAST_BATCHED_TOKENS),
        **_settings(device, dtype, longest),
    )


def _score(vllm: Any, llm: Any, windows: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of each window's tokens from the second on, nats."""
    if not windows:
        return []
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in windows], sampling, use_tqdm=False)
    return [
        [float(at[token].logprob) for token, at in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(windows, outputs, strict=True)
    ]


def _continue(vllm: Any, llm: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy continuation of each prompt."""
    if not prompts:
        return []
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _serve(model: str, dtype: str, port: int) -> None:
    """Becomes vLLM's server with the settings of ``_settings``; returns when it is told to end."""
    import vllm

    about = _about(vllm, model, dtype)
    # vLLM's command line asks for a distribution named vllm, which the CPU build on PyPI is not (0.32).
    named_vllm = any(True for _ in distributions(name="vllm"))
    module = "vllm.entrypoints.cli.main" if named_vllm else "vllm.entrypoints.openai.api_server"
    sys.argv = ["vllm", "serve", model] if named_vllm else ["vllm", "--model", model]
    sys.argv += ["--host", "127.0.0.1", "--port", str(port)]
    for name, value in _settings(about["device"], about["dtype"], _served(model)).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            sys.argv.append(option)
        elif value is not False:
            sys.argv += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    run_module(module, run_name="__main__")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
