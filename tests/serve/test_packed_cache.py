"""vLLM with the package's plug-in reads a packed cache as ``PackedCache`` does, each layer in its format."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.kv.cache import PackedCache
from compressor.kv.plan import KvPlan
from compressor.verify.process import engine_environment
from tests.serve.conftest import ROOT
from tests.serving.plans import mixed_plan
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("packed_worker.py")
NEW = 12
# Of unlike lengths, so that steps mix chunks of prompts with decoding; 64 tokens a step cut the longest.
LENGTHS = (100, 37, 5, 64)
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "block_size": 32,
}


def test_layers_in_formats_of_their_own(tmp_path: Path, engine_python: Path) -> None:
    """Log-probabilities of prompts and of what is generated, in float32, and the bytes of each slot."""
    source = tiny_llama(tmp_path / "model", layers=4, hidden=256, dtype=torch.float32)
    plan = mixed_plan(kv_heads=2, head_dim=64)
    plan.write(source)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    found = serve(source, prompts, engine_python, tmp_path)

    shapes = {name.split(".")[2]: cache for name, cache in found["caches"].items()}
    for index, layer in plan.layers.items():
        implementation, _, shape = shapes[str(index)]
        assert (implementation == "PackedImpl") == (layer.keys is not None)
        if layer.keys is not None:
            assert shape[1:] == [2, 32, layer.slot_bytes]

    packed, plain = expected(source, plan, found, prompts), expected(source, KvPlan(), found, prompts)
    for prompt, answer, wanted, without in zip(prompts, found["results"], packed, plain, strict=True):
        got = torch.tensor(answer["prompt"] + answer["logprobs"])
        assert len(got) == len(prompt) - 1 + NEW
        # Two engines sum in other orders; a key within rounding of a boundary may get the neighbouring code.
        error = (got - wanted).abs()
        assert error.median() < 1e-4
        assert error.mean() < 1e-3 * (wanted - without).abs().mean()


def expected(
    model_at: Path, plan: KvPlan, found: dict[str, Any], prompts: list[list[int]]
) -> list[torch.Tensor]:
    """Log-probabilities of the same tokens in one forward pass, every key and value read as stored."""
    model = AutoModelForCausalLM.from_pretrained(model_at, dtype=torch.float32).eval()
    scores = []
    for prompt, answer in zip(prompts, found["results"], strict=True):
        tokens = torch.tensor([prompt + answer["tokens"]])
        with torch.inference_mode():
            cache = PackedCache.of(model.config, plan.codecs())
            logits = model(tokens, past_key_values=cache).logits[0, :-1]
        scores.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0])
    return scores


def serve(model: Path, prompts: list[list[int]], python: Path, folder: Path) -> dict[str, Any]:
    """What the worker says, with this package's entry point in its path."""
    asked, out = folder / "asked.json", folder / "out.json"
    asked.write_text(json.dumps({"prompts": prompts, "new": NEW, "engine": ENGINE}))
    paths = os.pathsep.join(map(str, (installed(folder / "site"), ROOT)))
    env = engine_environment(python, {"PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"})
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), str(WORKER), str(model), str(asked), str(out)],
        env=env, cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    answer: dict[str, Any] = json.loads(out.read_text())
    return answer


def installed(folder: Path) -> Path:
    """A folder with the entry points of this package as an installation writes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["vllm.general_plugins"]
    lines = [f"{name} = {value}" for name, value in points.items()]
    info.joinpath("entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
    return folder
